"""Fused inference: the function that a trained model computes, with all constants multiplied out.

What is linear, with nothing nonlinear up to the next linear map, is composed with that map:

- batch norms go into the convolutions before them, and the backbone's padding into its kernels
  (model/fused_backbone.py);
- the standardization, the 1x1 convolution and the patch embedding become one convolution per stage.
  Where the stage's map has no more cells than there are tokens, the product with the channels comes
  before the resizing, so that the stage is never resized with all its channels;
- the summary of F is taken of the stages' maps, and resized after;
- the summary of F_hat needs no F_hat: it is a 1x1 convolution after a 1x1 convolution (squared
  residuals, where the FRM sees them, need both F_hat and F);
- the biases before an instance norm cancel;
- of the two logits only the difference counts.

The rest is the order of work that measured fastest; see docs/performance.md.
"""

from __future__ import annotations

import copy

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.frm import FRM
from almrr_pipeline.model.fused_backbone import FusedBackbone, draw_example, fuse_batch_norms
from almrr_pipeline.model.inputs import check_images
from almrr_pipeline.model.kernels.composed import (
    apply_separably,
    compose_convolutions,
    resize_bilinear,
)
from almrr_pipeline.model.kernels.pointwise import has_numba
from almrr_pipeline.model.kernels.scan.reference import without_autocast
from almrr_pipeline.model.mfrm import Decoder, to_map, to_tokens
from almrr_pipeline.model.posterior import to_probability, weigh_odds

_EPSILON = 1e-5
"""Of the instance norms, torch's default."""


def fuse(model: ALMRR) -> FusedALMRR:
    """Fuse a model for inference: equal to its `forward` in evaluation mode within 1e-4 in float32.

    The model stays as it is, and the result does not follow later changes of it.
    """
    # On the CPU and in full precision: while fusing, outputs are compared, which TF32 (a GPU's
    # convolutions) and autocast would blur, and constants are composed in float64, which MPS lacks.
    device = model.mfrm.position.device
    if device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    with without_autocast(model.mfrm.position):
        return FusedALMRR(model).to(device)


class FusedALMRR(nn.Module):
    """An `ALMRR` for inference alone: the same map, to float rounding, in about half the work.

    Attributes:
        image_size: rows and columns of the images.
    """

    def __init__(self, model: ALMRR) -> None:
        super().__init__()
        self.image_size = model.image_size
        self.posterior_gamma = model.settings.posterior_gamma
        scale, offset, summary = _standardized_summary(model)
        self.backbone = FusedBackbone(model.backbone, model.image_size)
        self.embedding = FusedEmbedding(model, scale, offset)
        self.encoder = copy.deepcopy(model.mfrm.encoder)
        self.token_grid = model.mfrm.token_grid
        self.inputs = FusedInputs(model, scale, offset, summary)
        if model.residual is not None:  # the decoder gives F_hat too, after its summary
            summary = torch.cat([summary, torch.eye(len(scale), dtype=summary.dtype)])
        self.decoder = FusedDecoder(model.mfrm.decoder, model.mfrm.expand, summary)
        self.frm = _fuse_frm(model.frm)
        self.requires_grad_(False)
        self.eval()
        # Composed in float64, kept in the model's own type.
        self.to(model.mfrm.position.dtype).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Map anomalies: RGB (B, 3, H, W) -> (B, H, W), floats in [0, 1]; without gradient.

        Raises:
            AlmrrError: the images have another shape, type or range, or are not finite.
        """
        check_images(images, self.image_size)
        if torch.compiler.is_compiling():
            return self.compute(images)
        with torch.no_grad():
            return self.compute(images.contiguous(memory_format=torch.channels_last))

    def compute(self, images: Tensor) -> Tensor:
        """`forward` without the checks of the input."""
        maps = self.backbone(images)  # (B, C_i, H / s_i, W / s_i) for s = 4, 8, 16
        tokens = self.encoder(self.embedding(maps))  # (B, n, dim)
        decoded = self.decoder(to_map(tokens, self.token_grid))  # (B, k, h, w), or k + C with F_hat
        inputs, evidence = self.inputs(maps, decoded)  # (B, 2 k + r, h, w), (B, 1, h, w)
        # The softmax of two logits is the logistic function of their difference.
        confidence = self.frm(inputs, images).sigmoid()  # (B, 1, h, w)
        confidence = resize_bilinear(confidence, self.image_size)[:, 0]  # (B, H, W)
        probability = to_probability(confidence, self.posterior_gamma)
        if evidence is None:
            return probability
        evidence = resize_bilinear(evidence, self.image_size)[:, 0]  # (B, H, W)
        return weigh_odds(probability, evidence, self.inputs.memory_exponent)


class FusedEmbedding(nn.Module):
    """From the stages' maps to tokens with their positions."""

    position: Tensor

    def __init__(self, model: ALMRR, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        mfrm, features = model.mfrm, model.regional_features
        with torch.no_grad():
            weight, bias = compose_convolutions(mfrm.reduce, mfrm.patch_embedding, torch.float64)
        bias = bias + torch.einsum("dcyx,c->d", weight, offset)
        self.register_buffer("position", mfrm.position.detach().double() + bias)
        weights = torch.split(weight * scale[:, None, None], list(model.backbone.channels), dim=1)
        self.stages = nn.ModuleList(
            _embed_stage(weight, *features.matrices(stage), tokens=self.position.shape[1])
            for stage, weight in enumerate(weights)
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """(B, C_i, n_i, m_i) for each stage -> tokens (B, n, dim)."""
        tokens = self.position
        for stage, x in zip(self.stages, maps, strict=True):
            tokens = tokens + stage(x)
        return tokens


class ResizeThenEmbed(nn.Module):
    """Tokens of a large stage: resize and pool the map, then convolve patch by patch."""

    weight: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone())  # (dim, C, patch, patch)
        self.register_buffer("rows", rows.clone())  # (h, n)
        self.register_buffer("columns", columns.clone())  # (w, m)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, n, m) -> (B, tokens, dim)."""
        x = apply_separably(x, self.rows, self.columns)  # (B, C, h, w)
        return to_tokens(F.conv2d(x, self.weight, stride=self.weight.shape[2:]))


class EmbedThenResize(nn.Module):
    """Tokens of a small stage: the product with the channels first, then rows and columns.

    Token (i, j) is the sum over positions (a, b) of a patch of W_ab times row `p i + a` and column
    `p j + b` of the resized map; W_ab acts on channels alone, so its product may come first.
    """

    weight: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.dim, _, self.patch, _ = weight.shape
        self.register_buffer("weight", rearrange(weight, "d c a b -> c (a b d)").contiguous())
        # One row per row of tokens, one column per (row of the map, position in the patch).
        rows = rearrange(rows, "(i a) n -> i (n a)", a=self.patch)
        columns = rearrange(columns, "(j b) m -> j (m b)", b=self.patch)
        self.register_buffer("rows", rows.contiguous())
        self.register_buffer("columns", columns.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, n, m) -> (B, tokens, dim)."""
        x = x.permute(0, 2, 3, 1) @ self.weight  # (B, n, m, patch patch dim)
        x = rearrange(x, "B n m (a b d) -> B n a (m b) d", a=self.patch, b=self.patch)
        x = self.columns @ x  # (B, n, a, token columns, dim)
        x = rearrange(x, "B n a j d -> B (n a) (j d)")
        x = self.rows @ x  # (B, token rows, token columns dim)
        return rearrange(x, "B i (j d) -> B (i j) d", d=self.dim)


class FusedInputs(nn.Module):
    """The FRM's inputs: summaries of F_hat and F, and mixtures of log(1 + (F - F_hat)^2) if any.

    The summary of F is taken of the stages' maps before resizing: k channels, not hundreds.
    """

    scale: Tensor
    offset: Tensor
    constant: Tensor

    def __init__(self, model: ALMRR, scale: Tensor, offset: Tensor, summary: Tensor) -> None:
        super().__init__()
        self.regional_features = copy.deepcopy(model.regional_features)
        self.mixture = copy.deepcopy(model.residual)
        self.memory = copy.deepcopy(model.memory)
        self.memory_is_input = model.settings.memory_input
        self.memory_exponent = model.settings.memory_exponent
        self.register_buffer("scale", scale[:, None, None].clone())
        self.register_buffer("offset", offset[:, None, None].clone())
        self.register_buffer("constant", (summary @ offset)[:, None, None])  # (k, 1, 1)
        weights = torch.split(summary * scale, list(model.backbone.channels), dim=1)
        for stage, weight in enumerate(weights):
            weight = weight[:, :, None, None].clone()  # (k, C_i, 1, 1)
            self.register_buffer(f"weight{stage}", weight)

    def forward(self, maps: list[Tensor], decoded: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stages (B, C_i, n_i, m_i) and `FusedDecoder`'s output -> (B, 2 k + r, h, w).

        With a memory as input one channel more. The second value is the memory's evidence, (B, 1,
        h, w), where it has any.
        """
        summary = self.constant
        for stage, x in enumerate(maps):
            x = F.conv2d(x, self.get_buffer(f"weight{stage}"))
            summary = summary + self.regional_features.transform(stage, x)
        k = len(self.constant)
        inputs = [decoded[:, :k], summary]
        if self.mixture is None and self.memory is None:
            return torch.cat(inputs, dim=1), None
        features = torch.addcmul(self.offset, self.regional_features(maps), self.scale)
        distances = None if self.memory is None else self.memory(features)
        if self.mixture is not None:
            residuals = features.sub_(decoded[:, k:]).square_().log1p_()  # in place: half the time
            inputs.append(F.conv2d(residuals, self.mixture.weight, self.mixture.bias))
        if self.memory is None or distances is None:
            return torch.cat(inputs, dim=1), None
        if self.memory_is_input:
            inputs.append(self.memory.relative(distances))
        evidence = self.memory.evidence(distances) if self.memory_exponent else None
        return torch.cat(inputs, dim=1), evidence


class FusedDecoder(nn.Module):
    """The decoder and, after it, the summary of the output of the last 1x1 convolution."""

    weight: Tensor
    bias: Tensor

    def __init__(self, decoder: Decoder, expand: nn.Conv2d, summary: Tensor) -> None:
        super().__init__()
        last = decoder.stage3[0]
        assert isinstance(last, nn.ConvTranspose2d)
        assert expand.bias is not None
        self.size = decoder.size
        first = (decoder.stage1, decoder.stage2)
        self.stages = nn.ModuleList(_without_bias(stage[0]) for stage in first)
        self.last = SubPixelConvolution(last.weight)
        weight = summary @ expand.weight.detach().flatten(1).double()  # (k, latent)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", summary @ expand.bias.detach().double())  # (k,)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, rows, columns) of tokens -> (B, k, h, w)."""
        for stage in self.stages:
            x = normalize(stage(x)).relu_()
        phases = self.last(x)
        outputs, latent = self.weight.shape
        if outputs < latent and _runs_numba(x):  # for F_hat itself a matrix product is as fast
            from almrr_pipeline.model.kernels.decoder_tail import summarize_phases

            weight, bias = self.weight, self.bias
            return summarize_phases(phases, weight, bias, size=self.size, epsilon=_EPSILON)
        x = normalize(interleave(phases)).relu_()  # (B, latent, 2 rows + 7, 2 columns + 7)
        x = resize_bilinear(x, self.size)
        return F.conv2d(x.tanh_(), self.weight[:, :, None, None], self.bias)


class SubPixelConvolution(nn.Module):
    """A transposed convolution, 3x3 with stride 2 and padding 1, as four plain ones without zeros.

    An even row of the output sees the middle row of the kernel, an odd one the last row at the
    input row before it and the first row at the one after; likewise the columns.

    Args:
        weight: (inputs, outputs, 3, 3), of the transposed convolution, which has no bias.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.detach().transpose(0, 1)  # (outputs, inputs, 3, 3)
        for i, rows in enumerate(([1], [2, 0])):
            for j, columns in enumerate(([1], [2, 0])):
                phase = weight[:, :, rows][:, :, :, columns].contiguous()
                self.register_buffer(f"weight{i}{j}", phase)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        """(B, inputs, n, m) -> the output's rows 2 y + i and columns 2 x + j as `phases[i][j]`.

        Each is (B, outputs, n - i, m - j); `interleave` makes one map of them.
        """
        return [[F.conv2d(x, self.get_buffer(f"weight{i}{j}")) for j in (0, 1)] for i in (0, 1)]


def interleave(phases: list[list[Tensor]]) -> Tensor:
    """Put even and odd rows and columns into one map, (B, C, 2 n - 1, 2 m - 1)."""
    even, odd = (_alternate(*columns, dim=3) for columns in phases)
    return _alternate(even, odd, dim=2)


def _alternate(even: Tensor, odd: Tensor, *, dim: int) -> Tensor:
    """Even positions from one, odd ones from the other, which is shorter by one."""
    first, last = even.narrow(dim, 0, odd.shape[dim]), even.narrow(dim, odd.shape[dim], 1)
    pairs = torch.stack([first, odd], dim=dim + 1).flatten(dim, dim + 1)
    return torch.cat([pairs, last], dim=dim)


def _runs_numba(x: Tensor) -> bool:
    """Whether the fused kernels can take this tensor: on the CPU, float32, and not into a graph."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and not torch.compiler.is_compiling() and has_numba()


def normalize(x: Tensor) -> Tensor:
    """Instance norm, as a group norm of one channel each: a CPU's channels stay innermost."""
    return F.group_norm(x, x.shape[1], eps=_EPSILON)


def _fuse_frm(frm: FRM) -> nn.Module:
    """Batch norms fused, and one output: the second logit minus the first."""
    inputs = frm.encoder[0][0].in_channels  # type: ignore[index]
    smallest = draw_example(inputs, 32, 32).to(frm.out.weight)
    images = draw_example(3, 128, 128).to(smallest)  # taken by a fine path only
    fused = fuse_batch_norms(frm, smallest, images)
    for module in fused.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    out = fused.get_submodule("out")
    assert isinstance(out, nn.Conv2d)
    assert out.bias is not None
    out.weight = nn.Parameter(out.weight[1:] - out.weight[:1])
    out.bias = nn.Parameter(out.bias[1:] - out.bias[:1])
    return fused


def _standardized_summary(model: ALMRR) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset (C,) of the standardization, and the summary as a matrix (k, C); float64."""
    mean, std = model.feature_mean.double(), model.feature_std.double()
    if not model.settings.standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    if isinstance(model.summary, nn.Conv2d):
        summary = model.summary.weight.detach().double().flatten(1)
    else:
        summary = torch.full((1, len(mean)), 1 / len(mean), dtype=torch.float64, device=mean.device)
    return 1 / std, -mean / std, summary


def _embed_stage(weight: Tensor, rows: Tensor, columns: Tensor, *, tokens: int) -> nn.Module:
    """The cheaper order for a stage: channels first costs by cells, positions first by tokens."""
    cells = rows.shape[1] * columns.shape[1]
    return (EmbedThenResize if cells <= tokens else ResizeThenEmbed)(weight, rows, columns)


def _without_bias(convolution: nn.Module) -> nn.Module:
    """A copy of a convolution whose bias the instance norm after it would remove again."""
    bare = copy.deepcopy(convolution)
    bare.register_parameter("bias", None)
    return bare
