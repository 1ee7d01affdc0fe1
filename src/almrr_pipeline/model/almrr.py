"""ALMRR: Anomaly Localization Mamba, feature Reconstruction and Refinement (arXiv 2407.17705).

stage 1   simulated anomalies                                 almrr_pipeline.synthesis
stage 2   frozen backbone, regional features        -> F      backbone.py, regional_features.py
stage 3   Mamba feature reconstruction module, MFRM -> F_hat  mfrm.py, bimamba.py
stage 4   feature refinement module, FRM            -> map    frm.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import ModelSettings
from almrr_pipeline.model import weights_io
from almrr_pipeline.model.backbone import Backbone, build_backbone
from almrr_pipeline.model.checksums import check_files
from almrr_pipeline.model.frm import FRM
from almrr_pipeline.model.inputs import (
    check_image_size,
    check_images,
    check_shape,
    find_counted_cells,
)
from almrr_pipeline.model.kernels.composed import resize_bilinear
from almrr_pipeline.model.kernels.pointwise import convolve_pointwise, mix_residuals
from almrr_pipeline.model.memory import FeatureMemory
from almrr_pipeline.model.mfrm import MFRM
from almrr_pipeline.model.posterior import to_probability, weigh_odds
from almrr_pipeline.model.regional_features import RegionalFeatures

MIN_STD = 0.01
"""Floor of a channel's std as a fraction of the channels' mean std: a channel that is constant on
normal images must not be scaled up until it hides all others."""

MEMORY_CHOICE = 10
"""Features drawn at random for each one that is remembered."""


@dataclass(frozen=True)
class TrainingOutput:
    """Inputs of the loss.

    Attributes:
        target: phi, the features of the normal images, (B, C, h, w).
        reconstruction: F_hat, reconstructed from the augmented images' features, (B, C, h, w).
        logits: (B, 2, H, W), channel 1 for anomalous: logarithms of the resized probabilities, so
            that their softmax is exactly the paper's anomaly map.
    """

    target: Tensor
    reconstruction: Tensor
    logits: Tensor


class ALMRR(nn.Module):
    """The network of the paper: images to anomaly maps.

    Args:
        backbone: the frozen feature extractor.
        settings: widths and depths of MFRM and FRM.
        image_size: rows and columns (H, W) of the images, multiples of 16, at least 128.
        scan_backend: implementation of the selective scan, see `almrr_pipeline.model.kernels.scan`;
            not saved with the weights.

    Raises:
        AlmrrError: the image size does not fit.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        settings: ModelSettings,
        *,
        image_size: tuple[int, int] = (256, 256),
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        check_image_size(image_size)
        self.settings = settings
        self.image_size = (image_size[0], image_size[1])
        channels = sum(backbone.channels)  # C: 1792 for ResNet-50
        self.backbone = backbone
        self.regional_features = RegionalFeatures(self.image_size)
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_std", torch.ones(channels))
        grid = self.regional_features.grid
        self.mfrm = MFRM(settings, channels=channels, grid=grid, scan_backend=scan_backend)
        self.summary: nn.Module = ChannelMean()
        if settings.refinement_input == "projection":
            self.summary = ChannelProjection(channels, settings.refinement_channels)
        self.residual: ResidualMixture | None = None
        if settings.residual_channels:
            self.residual = ResidualMixture(channels, settings.residual_channels)
        self.memory: FeatureMemory | None = None
        if settings.memory_size:
            self.memory = FeatureMemory(channels, settings.memory_size, settings.memory_exponent)
        inputs = 2 * settings.refinement_channels + settings.residual_channels
        inputs += self.memory is not None and settings.memory_input
        self.frm = FRM(
            inputs,
            width=settings.refinement_width,
            fine=settings.fine_channels,
            prior=settings.prior,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Anomaly maps of images.

        Args:
            images: RGB, float in [0, 1], shape (B, 3, H, W) with (H, W) = `image_size`.

        Returns:
            float in [0, 1], shape (B, H, W): the probability that a pixel is anomalous.

        Raises:
            AlmrrError: the images have another shape, type or range, or are not finite.
        """
        check_images(images, self.image_size)
        features = self.embed(images)  # stage 2: F (B, C, h, w), h = H / 4, w = W / 4
        reconstruction = self.reconstruct(features)  # stage 3, MFRM: F_hat (B, C, h, w)
        distances = None if self.memory is None else self.memory(features)  # (B, 1, h, w)
        # stage 4, FRM: (B, 2, h, w)
        logits = self.refine(reconstruction, features, images, distances)
        confidence = self.upsample(logits.softmax(dim=1))[:, 1]  # (B, H, W)
        probability = to_probability(confidence, self.settings.posterior_gamma)
        if self.memory is None or distances is None or not self.memory.exponent:
            return probability
        evidence = self.upsample(self.memory.evidence(distances))[:, 0]  # (B, H, W)
        return weigh_odds(probability, evidence, self.memory.exponent)

    def training_forward(
        self,
        normal: Tensor,
        augmented: Tensor,
        embedded: tuple[Tensor, Tensor] | None = None,
        owners: Tensor | None = None,
    ) -> TrainingOutput:
        """Both branches of the paper's figure: phi of the normal images, F of the augmented ones.

        Args:
            normal: RGB, float in [0, 1], shape (B, 3, H, W).
            augmented: the same images with simulated anomalies.
            embedded: phi and F, where `embed_both` has been called already.
            owners: int64 (B,), whose features of the memory are left out, see `fill_memory`.

        Raises:
            AlmrrError: shapes or types do not fit; values are not checked, since that waits for a
                GPU at every step.
        """
        check_shape(normal, self.image_size)
        check_shape(augmented, self.image_size)
        # stage 2: phi, F (B, C, h, w)
        target, features = embedded or self.embed_both(normal, augmented)
        reconstruction = self.reconstruct(features)  # stage 3, MFRM: F_hat (B, C, h, w)
        distances = None
        if self.memory is not None and self.settings.memory_input:
            distances = self.memory(features, owners)  # (B, 1, h, w)
        # stage 4, FRM: (B, 2, h, w)
        logits = self.refine(reconstruction, features, augmented, distances)
        probabilities = self.upsample(logits.softmax(dim=1))  # (B, 2, H, W)
        # The smallest normal float keeps the logarithm finite where the softmax underflows; the
        # gradient is zero there.
        resized = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        return TrainingOutput(target=target, reconstruction=reconstruction, logits=resized)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Stage 2: (B, 3, H, W) -> F (B, C, h, w), standardized if set; without gradient."""
        if images.device.type == "cpu":
            # On a CPU convolutions, resizing and normalization are faster with channels innermost,
            # and every later tensor keeps this format. On a GPU the caller chooses.
            images = images.contiguous(memory_format=torch.channels_last)
        return self.pool(self.backbone(images))

    @torch.no_grad()
    def pool(self, maps: Sequence[Tensor]) -> Tensor:
        """Stage 2 from the backbone's maps on: F (B, C, h, w), standardized if set."""
        features: Tensor = self.regional_features(maps)
        if self.settings.standardize:
            mean, std = self.feature_mean.to(features.dtype), self.feature_std.to(features.dtype)
            features = features.sub_(mean[:, None, None]).div_(std[:, None, None])
        return features

    def reconstruct(self, features: Tensor) -> Tensor:
        """Stage 3, MFRM: F (B, C, h, w) -> F_hat (B, C, h, w)."""
        return self.mfrm(features)  # type: ignore[no-any-return]

    def refine(
        self,
        reconstruction: Tensor,
        features: Tensor,
        images: Tensor,
        distances: Tensor | None = None,
    ) -> Tensor:
        """Stage 4, FRM: F_hat and F, each summarized to k channels -> logits (B, 2, h, w).

        With a fine path (B, 2, H / 2, W / 2). `distances` (B, 1, h, w) are the memory's, where they
        are an input.
        """
        inputs = [self.summary(reconstruction), self.summary(features)]  # (B, k, h, w) each
        if self.residual is not None:
            inputs.append(self.residual(features, reconstruction))  # (B, r, h, w)
        if self.memory is not None and self.settings.memory_input:
            assert distances is not None
            inputs.append(self.memory.relative(distances).to(features.dtype))  # (B, 1, h, w)
        return self.frm(torch.cat(inputs, dim=1), images)  # type: ignore[no-any-return]

    def upsample(self, x: Tensor) -> Tensor:
        """Bilinear resize (B, c, h, w) -> (B, c, H, W)."""
        return resize_bilinear(x, self.image_size)

    @torch.no_grad()
    def embed_both(
        self,
        normal: Tensor,
        augmented: Tensor,
        recall: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Phi and F in one call of the backbone; on a CPU clean samples are embedded once.

        There, `recall` may take the backbone's place. It gets images and their positions in the
        batch: below B in `normal`, from B on in `augmented`.
        """
        if normal.device.type != "cpu" or torch.compiler.is_compiling():
            target, features = self.embed(torch.cat([normal, augmented])).chunk(2)
            return target, features
        changed = (normal != augmented).flatten(1).any(dim=1)  # (B,); a GPU would be waited for
        images = torch.cat([normal, augmented[changed]])
        if recall is None:
            embedded = self.embed(images)
        else:
            chosen = torch.cat([torch.ones_like(changed), changed]).nonzero()[:, 0]
            embedded = self.pool(recall(images, chosen))
        rows = torch.arange(len(normal))
        rows[changed] = torch.arange(len(normal), len(embedded))
        innermost = embedded.permute(0, 2, 3, 1)  # rows are copied in the order of the memory
        return embedded[: len(normal)], innermost[rows].permute(0, 3, 1, 2)

    @torch.no_grad()
    def fit_standardization(self, batches: Iterable[Tensor]) -> None:
        """Set mean and std of every feature channel over normal images, in place.

        Args:
            batches: RGB, float in [0, 1], shape (B, 3, H, W) each.

        Raises:
            AlmrrError: the model does not standardize, there are no images, or they do not fit.
        """
        if not self.settings.standardize:
            raise AlmrrError("This model does not standardize its features; set model.standardize.")
        self.feature_mean.zero_()
        self.feature_std.fill_(1.0)
        mean, std = measure_channels(map(self._embed_checked, batches))
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp_min(MIN_STD * float(std.mean())))

    def fill_memory(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        images: int,
        seed: int,
        has_region: bool = False,
    ) -> None:
        """Choose the features of normal images that are remembered, in place.

        Args:
            batches: RGB, float in [0, 1], (B, 3, H, W) each, and a number for each image, int64
                (B,), equal where images show the same specimen.
            images: how many there are.
            seed: of the choice.
            has_region: whether what is blank in the images does not count.

        Raises:
            AlmrrError: the model has no memory, or the images do not fit.
        """
        if self.memory is None:
            raise AlmrrError("This model remembers no features; set model.memory_size.")
        embedded = (
            (self._embed_checked(batch), owners, *self._count_cells(batch, has_region))
            for batch, owners in batches
        )
        per_image = -(-MEMORY_CHOICE * self.settings.memory_size // images)
        self.memory.fill(embedded, per_image=per_image, seed=seed)

    def fit_evidence(self, batches: Iterable[Tensor], *, has_region: bool = False) -> None:
        """Measure which distance to the memory is no evidence of an anomaly, in place.

        Args:
            batches: RGB, float in [0, 1], (B, 3, H, W) each, normal and not remembered; none leave
                what `fill_memory` has measured.
            has_region: whether what is blank in the images does not count.

        Raises:
            AlmrrError: the memory is no evidence in this model, or the images do not fit.
        """
        if self.memory is None or not self.memory.exponent:
            raise AlmrrError("This model weighs no distances; set model.memory_exponent.")
        self.memory.fit_neutral(
            (self._embed_checked(batch), *self._count_cells(batch, has_region)) for batch in batches
        )

    def _embed_checked(self, images: Tensor) -> Tensor:
        check_images(images, self.image_size)
        return self.embed(images)

    def _count_cells(self, images: Tensor, has_region: bool) -> list[Tensor]:
        """Which of the memory's cells count, where not all do."""
        rows, columns = self.regional_features.grid
        return [find_counted_cells(images, (rows // 2, columns // 2))] if has_region else []

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of MFRM, FRM and the FRM's learned inputs; the backbone is frozen."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def save(self, folder: Path) -> None:
        """Write model.safetensors (with the backbone), config.json and their checksums."""
        config = weights_io.ModelConfig(
            backbone=self.backbone.settings, image_size=self.image_size, model=self.settings
        )
        weights_io.write_model(folder, config, self.state_dict())

    @classmethod
    def load(
        cls, folder: Path, *, device: str | torch.device = "cpu", scan_backend: str = "auto"
    ) -> Self:
        """A saved model in evaluation mode; nothing is downloaded.

        Raises:
            AlmrrError: the folder holds no model, one of version 0.1, or files that do not match.
        """
        config = weights_io.read_config(folder)
        path = folder / weights_io.WEIGHTS_FILE
        header, size = weights_io.read_header(path), config.image_size
        # Sizes are compared before memory is taken.
        try:
            with torch.device("meta"):
                backbone = build_backbone(config.backbone, weights=None)
                empty = cls(backbone, config.model, image_size=size)
        except NotImplementedError:
            pass  # torch cannot build this backbone on the meta device: compared when loaded
        else:
            weights_io.check_header(empty, header, origin=str(folder))
        check_files(folder, weights_io.CONFIG_FILE, weights_io.WEIGHTS_FILE)
        backbone = build_backbone(config.backbone, weights=None)
        model = cls(backbone, config.model, image_size=size, scan_backend=scan_backend)
        tensors = weights_io.read_weights(path)
        weights_io.load_weights(model, tensors, origin=str(folder), exact=True)
        return model.eval().to(device)


def measure_channels(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and std, float64 (C,), of features (B, C, h, w) in one pass over their batches.

    By the update of Chan, Golub and LeVeque (1979): no differences of large sums.
    """
    count = 0
    mean = squares = torch.zeros((), dtype=torch.float64)  # squares: of distances from the mean
    for batch in batches:
        features = batch.cpu() if batch.device.type == "mps" else batch  # MPS has no float64
        mean, squares = mean.to(features.device), squares.to(features.device)
        added = features.shape[0] * features.shape[2] * features.shape[3]
        own_mean = features.mean((0, 2, 3), dtype=torch.float64)  # (C,)
        distances = features - own_mean.to(features.dtype)[:, None, None]  # (B, C, h, w)
        shift = own_mean - mean
        squares = squares + distances.square().sum((0, 2, 3), dtype=torch.float64)
        squares = squares + shift.square() * (count * added / (count + added))
        mean = mean + shift * (added / (count + added))
        count += added
    if count == 0:
        raise AlmrrError("There is no normal image to standardize the features with.")
    return mean, (squares / count).sqrt()


class ChannelMean(nn.Module):
    """The paper's summary: the mean over the channels, (B, C, h, w) -> (B, 1, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Average over the channels."""
        return x.mean(dim=1, keepdim=True)


class ChannelProjection(nn.Conv2d):
    """A learned linear summary, (B, C, h, w) -> (B, k, h, w), in place of the paper's mean.

    The first output starts as the mean; the others as random directions of the same length,
    orthogonal to it and to each other.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, 1, bias=False)
        directions = torch.randn(channels, outputs)
        directions[:, 0] = 1.0
        orthonormal, triangle = torch.linalg.qr(directions)  # (C, k), (k, k)
        orthonormal[:, 0] *= triangle[0, 0].sign()
        with torch.no_grad():
            self.weight.copy_((orthonormal / channels**0.5).T[:, :, None, None])  # (k, C, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Project the channels."""
        return convolve_pointwise(x, self.weight, None)


class ResidualMixture(nn.Conv2d):
    """Learned mixtures of log(1 + (F - F_hat)^2): (B, C, h, w) twice -> (B, r, h, w).

    The square is taken per channel: a projection adds differences of opposite sign to nothing. The
    weights start in [0, 2 / C], so that each mixture is at first close to the channels' mean.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, 1)
        nn.init.uniform_(self.weight, 0.0, 2.0 / channels)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:  # type: ignore[override]
        """Mix the logarithms."""
        assert self.bias is not None
        return mix_residuals(features, reconstruction, self.weight, self.bias)
