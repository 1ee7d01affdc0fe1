"""The same function as a trained model computes, with everything that is fixed multiplied out beforehand.

What is linear and has nothing nonlinear behind it until the next linear map is composed with that map:

- batch norms go into the convolutions before them;
- the standardization, the 1x1 convolution and the patch embedding become one convolution a stage; and where the stage's
  map has no more cells than there are tokens, that convolution's product with the channels comes first and the resizing
  after, so that the stage is never resized with all its channels;
- the summary of F is taken of the stages' maps, and resized after;
- the summary of F_hat needs no F_hat: a weighted sum over the outputs of a 1x1 convolution is one of its inputs;
- the biases before an instance norm cancel;
- of the two logits only the difference counts.

The rest is the order of work that measured fastest; see docs/performance.md.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from functools import cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.fusion import fuse_conv_bn_weights

from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import Backbone
from almrr_pipeline.model.frm import FRM
from almrr_pipeline.model.inputs import check_images
from almrr_pipeline.model.kernels.scan.reference import without_autocast
from almrr_pipeline.model.mfrm import Decoder, to_map, to_tokens
from almrr_pipeline.model.kernels.embedding import compose_convolutions
from almrr_pipeline.model.kernels.resizing import apply_separably

_TOLERANCE = 1e-3
"""Largest relative change of a network's output that fusing its batch norms may make; rounding makes about 1e-6."""
_EPSILON = 1e-5
"""Of the instance norms, torch's default."""
_logger = logging.getLogger(__name__)


def fuse(model: ALMRR) -> FusedALMRR:
    """Fuse a model for inference: equal to its `forward` in evaluation mode within 1e-4 in float32.

    The model stays as it is, and the result does not follow later changes of it.
    """
    # Outputs are compared while fusing; half precision would blur them.
    with without_autocast(model.mfrm.position):
        return FusedALMRR(model)


class FusedALMRR(nn.Module):
    """An `ALMRR` for inference alone: the same map, to float rounding, in about half the work.

    Attributes:
        image_size: rows and columns of the images.
    """

    def __init__(self, model: ALMRR) -> None:
        super().__init__()
        self.image_size = model.image_size
        scale, offset, summary = _standardized_summary(model)
        self.backbone = FusedBackbone(model.backbone, model.image_size)
        self.embedding = FusedEmbedding(model, scale, offset)
        self.summary = FusedSummary(model, scale, offset, summary)
        self.encoder = copy.deepcopy(model.mfrm.encoder)
        self.token_grid = model.mfrm.token_grid
        self.decoder = FusedDecoder(model.mfrm.decoder, model.mfrm.expand, summary)
        self.frm = _fuse_frm(model.frm, inputs=2 * len(summary))
        self.requires_grad_(False)
        self.eval()
        # Composed in float64, kept in the model's own type.
        self.to(model.mfrm.position.dtype).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Map anomalies: RGB, float in [0, 1], (B, 3, H, W) to a float map in [0, 1], (B, H, W); without gradient.

        Raises:
            AlmrrError: the images have another shape, type or range, or are not finite.
        """
        check_images(images, self.image_size)
        if torch.compiler.is_compiling():
            return self.compute(images)
        with torch.no_grad():
            return self.compute(images.contiguous(memory_format=torch.channels_last))

    def compute(self, images: Tensor) -> Tensor:
        """What `forward` does, without looking at the input."""
        maps = self.backbone(images)  # (B, C_i, H / s_i, W / s_i) for s = 4, 8, 16
        tokens = self.encoder(self.embedding(maps))  # (B, n, dim)
        repaired = self.decoder(
            to_map(tokens, self.token_grid)
        )  # (B, k, h, w), the summary of F_hat
        stacked = torch.cat([repaired, self.summary(maps)], dim=1)  # (B, 2 k, h, w)
        # The softmax of two logits is the logistic function of their difference.
        probability = self.frm(stacked).sigmoid()  # (B, 1, h, w)
        resized = F.interpolate(
            probability, size=self.image_size, mode="bilinear", align_corners=True
        )
        return resized[:, 0]  # (B, H, W)


class FusedBackbone(nn.Module):
    """The backbone with its batch norms inside its convolutions, and its normalization as one multiply-add."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, image_size: tuple[int, int]) -> None:
        super().__init__()
        # The normalization stays outside of the stem, whose padding is zeros *after* it: fusing it in would need an
        # explicitly padded copy of the image, which costs as much as the normalization.
        self.register_buffer("scale", 1 / backbone.std)
        self.register_buffer("shift", -backbone.mean / backbone.std)
        self.network = fuse_batch_norms(
            backbone.network, _draw_example(3, *image_size).to(backbone.mean)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract features, as `Backbone.forward` does."""
        return list(self.network(torch.addcmul(self.shift, images, self.scale)))


class FusedEmbedding(nn.Module):
    """Maps to tokens with their positions: regional features, standardization, 1x1 convolution, patch embedding."""

    position: Tensor

    def __init__(self, model: ALMRR, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            weight, bias = compose_convolutions(
                model.mfrm.reduce, model.mfrm.patch_embedding, torch.float64
            )
        bias = bias + torch.einsum("dcyx,c->d", weight, offset)
        self.register_buffer("position", model.mfrm.position.detach().double() + bias)
        weights = torch.split(weight * scale[:, None, None], list(model.backbone.channels), dim=1)
        self.stages = nn.ModuleList(
            _embed_stage(
                stage_weight,
                *model.regional_features.matrices(stage),
                tokens=self.position.shape[1],
            )
            for stage, stage_weight in enumerate(weights)
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """(B, C_i, n_i, m_i) for each stage -> tokens (B, n, dim)."""
        tokens = self.position
        for stage, x in zip(self.stages, maps, strict=True):
            tokens = tokens + stage(x)
        return tokens


class ResizeThenEmbed(nn.Module):
    """Tokens of a large stage: resize and pool the map, then a convolution a patch at a time."""

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
    """Tokens of a small stage: from channels to the places of a patch first, then rows and columns.

    Token (i, j) is the sum over places (a, b) of a patch of W_ab times row `p i + a` and column `p j + b` of the
    resized map; the product with W_ab does not care for places, so it may come before the resizing.
    """

    weight: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.dim, _, self.patch, _ = weight.shape
        self.register_buffer("weight", rearrange(weight, "d c a b -> c (a b d)").contiguous())
        # One row for each row of tokens, one column for each (row of the map, place in the patch).
        self.register_buffer(
            "rows", rearrange(rows, "(i a) n -> i (n a)", a=self.patch).contiguous()
        )
        self.register_buffer(
            "columns", rearrange(columns, "(j b) m -> j (m b)", b=self.patch).contiguous()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, n, m) -> (B, tokens, dim)."""
        x = x.permute(0, 2, 3, 1) @ self.weight  # (B, n, m, patch patch dim)
        x = rearrange(x, "B n m (a b d) -> B n a (m b) d", a=self.patch, b=self.patch)
        x = self.columns @ x  # (B, n, a, token columns, dim)
        x = rearrange(x, "B n a j d -> B (n a) (j d)")
        x = self.rows @ x  # (B, token rows, token columns dim)
        return rearrange(x, "B i (j d) -> B (i j) d", d=self.dim)


class FusedSummary(nn.Module):
    """The summary of F, taken of the stages' maps before they are resized: k channels instead of hundreds."""

    constant: Tensor

    def __init__(self, model: ALMRR, scale: Tensor, offset: Tensor, summary: Tensor) -> None:
        super().__init__()
        self.register_buffer("constant", (summary @ offset)[:, None, None])
        self.regional_features = copy.deepcopy(model.regional_features)
        weights = torch.split(summary * scale, list(model.backbone.channels), dim=1)
        for stage, weight in enumerate(weights):
            self.register_buffer(
                f"weight{stage}", weight[:, :, None, None].clone()
            )  # (k, C_i, 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """(B, C_i, n_i, m_i) for each stage -> (B, k, h, w)."""
        total = self.constant
        for stage, x in enumerate(maps):
            total = total + self.regional_features.transform(
                stage, F.conv2d(x, self.get_buffer(f"weight{stage}"))
            )
        return total


class FusedDecoder(nn.Module):
    """The decoder and, behind it, the summary of what the last 1x1 convolution would give."""

    weight: Tensor
    bias: Tensor

    def __init__(self, decoder: Decoder, expand: nn.Conv2d, summary: Tensor) -> None:
        super().__init__()
        last = decoder.stage3[0]
        assert isinstance(last, nn.ConvTranspose2d)
        assert expand.bias is not None
        self.size = decoder.size
        self.stages = nn.ModuleList(
            _without_bias(stage[0]) for stage in (decoder.stage1, decoder.stage2)
        )
        self.last = SubPixelConvolution(last.weight)
        self.register_buffer(
            "weight", summary @ expand.weight.detach().flatten(1).double()
        )  # (k, latent)
        self.register_buffer("bias", summary @ expand.bias.detach().double())  # (k,)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, rows, columns) of tokens -> (B, k, h, w)."""
        for stage in self.stages:
            x = normalize(stage(x)).relu_()
        phases = self.last.compute_phases(x)
        if _runs_numba(x):
            from almrr_pipeline.model.kernels.decoder_tail import summarize_phases

            return summarize_phases(
                phases, self.weight, self.bias, size=self.size, epsilon=_EPSILON
            )
        x = normalize(interleave(phases)).relu_()
        x = F.interpolate(
            x, size=self.size, mode="bilinear", align_corners=True
        )  # (B, latent, h, w)
        return F.conv2d(x.tanh_(), self.weight[:, :, None, None], self.bias)


class SubPixelConvolution(nn.Module):
    """A transposed convolution, 3x3 with stride 2 and padding 1, as four plain ones: no product with a zero between.

    An even row of the output sees the middle row of the kernel, an odd one the last row at the input row before it and
    the first row at the one after; likewise the columns.

    Args:
        weight: (inputs, outputs, 3, 3), of the transposed convolution, which has no bias.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.detach().transpose(0, 1)  # (outputs, inputs, 3, 3)
        for i, rows in enumerate(([1], [2, 0])):
            for j, columns in enumerate(([1], [2, 0])):
                self.register_buffer(
                    f"weight{i}{j}", weight[:, :, rows][:, :, :, columns].contiguous()
                )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, n, m) -> (B, outputs, 2 n - 1, 2 m - 1)."""
        return interleave(self.compute_phases(x))

    def compute_phases(self, x: Tensor) -> list[list[Tensor]]:
        """Even and odd rows, even and odd columns of the output: item [i][j] is (B, outputs, n - i, m - j)."""
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
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and _has_numba()
    )


@cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def normalize(x: Tensor) -> Tensor:
    """Instance norm, as a group norm with one channel a group: on a CPU that one leaves the channels innermost."""
    return F.group_norm(x, x.shape[1], eps=_EPSILON)


def fuse_batch_norms(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy of a network, in evaluation mode, with the batch norms fused into the convolutions before them.

    Which norm follows which convolution is seen by running the network once; the result is run against the original.

    Args:
        network: any network of tensors to tensors.
        example: an input for it.

    Returns:
        The fused copy; or, where fusing changes the outputs (a convolution used twice, or normalized by other means),
        a plain copy, which is logged.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    names = {module: name for name, module in fused.named_modules()}
    for convolution, norm in _convolutions_before_norms(fused, example):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        convolution.weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.bias = bias
        # timm's BatchNormAct2d is a batch norm that carries its activation.
        fused.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
    if _differ(plain, fused, example):
        _logger.warning(
            "The batch norms of %s cannot be fused; inference runs with them.",
            type(network).__name__,
        )
        return plain
    return fused.requires_grad_(False)


def _convolutions_before_norms(
    network: nn.Module, example: Tensor
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    made_by: dict[
        int, tuple[nn.Conv2d, Tensor]
    ] = {}  # the tensor is kept, so that its id stays its own
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made_by[id(output)] = (module, output)

    def note_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])][0], module))

    handles = [
        m.register_forward_hook(note_output) for m in network.modules() if isinstance(m, nn.Conv2d)
    ]
    handles += [
        m.register_forward_pre_hook(note_input)
        for m in network.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return pairs


def _differ(plain: nn.Module, fused: nn.Module, example: Tensor) -> bool:
    with torch.no_grad():
        expected, given = plain(example), fused(example)
    if isinstance(expected, Tensor):
        expected, given = [expected], [given]
    return any(
        bool((e - g).abs().max() > _TOLERANCE * e.abs().max())
        for e, g in zip(expected, given, strict=True)
    )


def _draw_example(*shape: int) -> Tensor:
    """A batch of one, always the same; the caller's random state stays as it was."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def _fuse_frm(frm: FRM, *, inputs: int) -> nn.Module:
    """Batch norms fused, and one output: the second logit minus the first."""
    smallest = _draw_example(inputs, 32, 32).to(frm.out.weight)
    fused = fuse_batch_norms(frm, smallest)
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
    """The standardization as factor and offset a channel, and the summary as a matrix (k, C); all float64.

    Standardized features are `scale * features + offset`.
    """
    mean, std = model.feature_mean.double(), model.feature_std.double()
    if not model.settings.standardize:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    if isinstance(model.summary, nn.Conv2d):
        summary = model.summary.weight.detach().double().flatten(1)
    else:
        summary = torch.full((1, len(mean)), 1 / len(mean), dtype=torch.float64, device=mean.device)
    return 1 / std, -mean / std, summary


def _embed_stage(weight: Tensor, rows: Tensor, columns: Tensor, *, tokens: int) -> nn.Module:
    """The cheaper order for one stage: by channels first costs cells, by places first costs tokens."""
    cells = rows.shape[1] * columns.shape[1]
    return (EmbedThenResize if cells <= tokens else ResizeThenEmbed)(weight, rows, columns)


def _without_bias(convolution: nn.Module) -> nn.Module:
    """A copy of a convolution whose bias the instance norm behind it takes away again."""
    bare = copy.deepcopy(convolution)
    bare.register_parameter("bias", None)
    return bare
