"""ALMRR: Anomaly Localization Mamba with Feature Reconstruction and Refinement (arXiv 2407.17705, PRCV 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import ModelSettings
from almrr_pipeline.model.backbone import Backbone, build_backbone
from almrr_pipeline.model.frm import FRM
from almrr_pipeline.model.inputs import check_image_size, check_images, check_shape
from almrr_pipeline.model.mfrm import MFRM
from almrr_pipeline.model.regional_features import RegionalFeatures
from almrr_pipeline.model.weights_io import ModelConfig, read_config, read_tensors, write_model

MIN_STD = 0.01
"""Floor of a channel's std, over the mean of all: one silent on normal images must not drown the others."""


@dataclass(frozen=True)
class TrainingOutput:
    """What the loss needs.

    Attributes:
        target: phi, the features of the normal images, (B, C, h, w).
        reconstruction: F_hat, the repaired features of the augmented images, (B, C, h, w).
        logits: (B, 2, H, W) at the size of the image, channel 1 for defective. They are logarithms of probabilities,
            which are logits too: their softmax is the paper's map, softmax first and resized after.
    """

    target: Tensor
    reconstruction: Tensor
    logits: Tensor


class ALMRR(nn.Module):
    """Features of an image, their reconstruction as if nothing were wrong, and a map of where the two disagree.

    Args:
        backbone: the frozen feature extractor.
        settings: widths and depths of MFRM and FRM.
        image_size: rows and columns of the images, multiples of 16, at least 128.
        scan_backend: implementation of the selective scan; not saved with the weights.

    Raises:
        AlmrrError: a size or width does not fit.
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
        channels = sum(backbone.channels)
        self.backbone = backbone
        self.regional_features = RegionalFeatures(self.image_size)
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_std", torch.ones(channels))
        self.mfrm = MFRM(
            settings,
            channels=channels,
            grid=self.regional_features.grid,
            scan_backend=scan_backend,
        )
        self.summary: nn.Module = ChannelMean()
        if settings.refinement_input == "projection":
            self.summary = ChannelProjection(channels, settings.refinement_channels)
        self.frm = FRM(2 * settings.refinement_channels, width=settings.refinement_width)

    def forward(self, images: Tensor) -> Tensor:
        """Map anomalies.

        Args:
            images: RGB, float in [0, 1], shape (B, 3, H, W) with (H, W) = `image_size`.

        Returns:
            Anomaly map, float in [0, 1], shape (B, H, W): the probability that a pixel is defective.

        Raises:
            AlmrrError: the images have another shape, type or range, or are not finite.
        """
        check_images(images, self.image_size)
        features = self.embed(images)  # F (B, C, h, w)                  stage 2
        reconstruction = self.reconstruct(features)  # F_hat (B, C, h, w)         stage 3, MFRM
        logits = self.refine(reconstruction, features)  # (B, 2, h, w)                stage 4, FRM
        return self.upsample(logits.softmax(dim=1))[:, 1]  # (B, H, W)

    def training_forward(self, normal: Tensor, augmented: Tensor) -> TrainingOutput:
        """Run both branches of the paper's figure: phi from the normal images, F from the augmented ones.

        Args:
            normal: RGB, float in [0, 1], shape (B, 3, H, W).
            augmented: the same images with simulated anomalies.

        Raises:
            AlmrrError: shapes or types do not fit. (Values are not looked at: a GPU would have to wait at every step.)
        """
        check_shape(normal, self.image_size)
        check_shape(augmented, self.image_size)
        target, features = self._embed_both(normal, augmented)  # phi, F (B, C, h, w) each
        reconstruction = self.reconstruct(features)  # F_hat (B, C, h, w)
        probabilities = self.upsample(self.refine(reconstruction, features).softmax(dim=1))  # (B, 2, H, W)
        # The smallest normal float keeps the logarithm finite where the softmax underflows; its gradient there is zero.
        logits = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        return TrainingOutput(target=target, reconstruction=reconstruction, logits=logits)

    @torch.no_grad()
    def _embed_both(self, normal: Tensor, augmented: Tensor) -> tuple[Tensor, Tensor]:
        """Both phi and F (B, C, h, w) in one call of the backbone.

        On a CPU, images without an anomaly, half of the pool, are embedded once; a GPU would have to wait to be told
        which those are.
        """
        if normal.device.type != "cpu" or torch.compiler.is_compiling():
            target, features = self.embed(torch.cat([normal, augmented])).chunk(2)
            return target, features
        changed = (normal != augmented).flatten(1).any(dim=1)  # (B,)
        embedded = self.embed(torch.cat([normal, augmented[changed]]))
        target = embedded[: len(normal)]
        features = target.clone()
        features[changed] = embedded[len(normal) :]
        return target, features

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Stage 2: regional features (B, C, h, w) of the frozen backbone, standardized if asked for; no gradient."""
        if images.device.type == "cpu":
            # Convolutions, resizing and normalization are all faster on a CPU with the channels innermost; from here on
            # every tensor follows this format. On a GPU it is the caller's choice.
            images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.regional_features(self.backbone(images))
        if self.settings.standardize:
            mean, std = self.feature_mean.to(features.dtype), self.feature_std.to(features.dtype)
            features = (features - mean[:, None, None]) / std[:, None, None]
        return features

    def reconstruct(self, features: Tensor) -> Tensor:
        """Stage 3, MFRM: F (B, C, h, w) -> F_hat (B, C, h, w)."""
        return self.mfrm(features)  # type: ignore[no-any-return]

    def refine(self, reconstruction: Tensor, features: Tensor) -> Tensor:
        """Stage 4, FRM: summaries of F_hat and F, stacked, through the U-Net; logits (B, 2, h, w)."""
        stacked = torch.cat([self.summary(reconstruction), self.summary(features)], dim=1)  # (B, 2 k, h, w)
        return self.frm(stacked)  # type: ignore[no-any-return]

    def upsample(self, x: Tensor) -> Tensor:
        """Resize (B, c, h, w) to the size of the image, (B, c, H, W)."""
        return F.interpolate(x, size=self.image_size, mode="bilinear", align_corners=True)

    @torch.no_grad()
    def fit_standardization(self, batches: Iterable[Tensor]) -> None:
        """Set the mean and std of every feature channel over normal images; changes the model in place.

        Args:
            batches: RGB, float in [0, 1], shape (B, 3, H, W) each.

        Raises:
            AlmrrError: the model does not standardize, there are no images, or they do not fit.
        """
        if not self.settings.standardize:
            raise AlmrrError("This model does not standardize its features; build it with standardize=True.")
        own = self.feature_mean.device
        device = torch.device("cpu") if own.type == "mps" else own  # MPS knows no float64
        count, mean = 0, torch.zeros(len(self.feature_mean), dtype=torch.float64, device=device)
        squares = torch.zeros_like(mean)  # sum of squared distances from the mean
        self.feature_mean.zero_()
        self.feature_std.fill_(1.0)
        for images in batches:
            check_images(images, self.image_size)
            features = self.embed(images).to(device)  # (B, C, h, w)
            added = features.shape[0] * features.shape[2] * features.shape[3]
            own_mean = features.mean((0, 2, 3), dtype=torch.float64)  # (C,)
            distances = features - own_mean.to(features.dtype)[:, None, None]
            # Chan's update: one pass over the images, and no difference of large sums.
            shift = own_mean - mean
            squares += distances.square().sum((0, 2, 3), dtype=torch.float64)
            squares += shift.square() * (count * added / (count + added))
            mean += shift * (added / (count + added))
            count += added
        if count == 0:
            raise AlmrrError("There is no normal image to standardize the features with.")
        std = (squares / count).sqrt()
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std.clamp_min(MIN_STD * float(std.mean())))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of MFRM, FRM and the projection, if there is one; the backbone has none to train."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def save(self, folder: Path) -> None:
        """Write model.safetensors (backbone included) and config.json into an existing folder.

        Each file is written beside its place and renamed, so that no half-written one is ever found.
        """
        config = ModelConfig(
            backbone=self.backbone.settings, image_size=self.image_size, model=self.settings
        )
        write_model(folder, config, self.state_dict())

    @classmethod
    def load(cls, folder: Path, *, device: str | torch.device = "cpu", scan_backend: str = "auto") -> Self:
        """Rebuild a saved model, in evaluation mode, without hub or download.

        Raises:
            AlmrrError: the folder holds no model, or its config does not fit its weights; says what differs.
        """
        config = read_config(folder)
        backbone = build_backbone(config.backbone, weights=None)
        model = cls(
            backbone, config.model, image_size=config.image_size, scan_backend=scan_backend
        )
        model.load_state_dict(read_tensors(folder, expected=model.state_dict()))
        return model.eval().to(device)


class ChannelMean(nn.Module):
    """The paper's summary: the mean over the channels, (B, C, h, w) -> (B, 1, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Average over the channels."""
        return x.mean(dim=1, keepdim=True)


class ChannelProjection(nn.Conv2d):
    """A learned linear summary, (B, C, h, w) -> (B, k, h, w).

    The first output begins as the mean; the others as random directions of the same length, orthogonal to it and to
    each other.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, 1, bias=False)
        directions = torch.randn(channels, outputs)
        directions[:, 0] = 1.0
        orthonormal, triangle = torch.linalg.qr(directions)  # (C, k)
        orthonormal[:, 0] *= triangle[0, 0].sign()
        with torch.no_grad():
            self.weight.copy_((orthonormal / channels**0.5).T[:, :, None, None])
