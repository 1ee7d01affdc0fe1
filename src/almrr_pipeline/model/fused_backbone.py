"""The frozen backbone with its constants multiplied out: the same maps, to rounding, in less time.

- Batch norms go into the convolutions before them;
- where maps are copied to be padded (TensorFlow's uneven padding), a zero row and column of the
  kernel take the copy's place.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from functools import partial

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.fusion import fuse_conv_bn_weights

from almrr_pipeline.model.backbone import Backbone

_TOLERANCE = 1e-3
"""Largest relative change of outputs by fused batch norms; rounding makes about 1e-6."""
logger = logging.getLogger(__name__)


class FusedBackbone(nn.Module):
    """The backbone, batch norms inside its convolutions and its normalization one multiply-add."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, image_size: tuple[int, int]) -> None:
        super().__init__()
        # The normalization is not fused into the stem, which pads with zeros after it: that would
        # need an explicitly padded copy of the image, which costs as much as the normalization.
        self.register_buffer("scale", 1 / backbone.std)
        self.register_buffer("shift", -backbone.mean / backbone.std)
        example = draw_example(3, *image_size).to(backbone.mean)
        self.network = absorb_padding(fuse_batch_norms(backbone.network, example), example)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract features, as `Backbone.forward` does."""
        return list(self.network(torch.addcmul(self.shift, images, self.scale)))


def fuse_batch_norms(network: nn.Module, *example: Tensor) -> nn.Module:
    """Copy a network, in evaluation mode, with its batch norms fused into the convolutions before.

    Which norm follows which convolution is found by running the network once.

    Args:
        network: any network of tensors to tensors.
        example: inputs for it; the outputs of copy and original are compared on them.

    Returns:
        The fused copy; or, where fusing changes the outputs (a convolution used twice, or
        normalized by other means), a plain copy, which is logged.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    names = {module: name for name, module in fused.named_modules()}
    for convolution, norm in _convolutions_before_norms(fused, *example):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        statistics = (norm.running_mean, norm.running_var, norm.eps)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, *statistics, norm.weight, norm.bias
        )
        # timm's BatchNormAct2d is a batch norm that carries its activation.
        fused.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
    if _differ(plain, fused, *example):
        name = type(network).__name__
        logger.warning("The batch norms of %s cannot be fused; it runs with them.", name)
        return plain
    return fused.requires_grad_(False)


def absorb_padding(network: nn.Module, example: Tensor) -> nn.Module:
    """Pad in the convolutions of a network instead of before them, where timm's Conv2dSame does.

    Its padding, TensorFlow's, may have one row and column more at the end than at the start. With a
    zero row and column before the kernel an even padding gives the same sums, and nothing is
    copied.

    Args:
        network: changed in place; from now on for maps of the example's size alone.
        example: an input of the network.
    """
    for name, sides in _input_sides(network, example, Conv2dSame).items():
        old = network.get_submodule(name)
        assert isinstance(old, Conv2dSame)
        steps = zip(sides, old.kernel_size, old.stride, strict=True)
        rows, columns = (max(0, (-(-n // s) - 1) * s + k - n) for n, k, s in steps)
        if old.dilation != (1, 1):
            continue
        weight = F.pad(old.weight.detach(), (columns % 2, 0, rows % 2, 0))
        new = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            (weight.shape[2], weight.shape[3]),
            (old.stride[0], old.stride[1]),
            (-(-rows // 2), -(-columns // 2)),
            groups=old.groups,
            bias=old.bias is not None,
        )
        new.weight, new.bias = nn.Parameter(weight, requires_grad=False), old.bias
        network.set_submodule(name, new.train(old.training))
    return network


def _input_sides(
    network: nn.Module, example: Tensor, kind: type[nn.Module]
) -> dict[str, tuple[int, int]]:
    """Rows and columns of the maps that modules of a type take, by name; of those that take one."""
    sides: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sides[name].append((inputs[0].shape[2], inputs[0].shape[3]))

    modules = [(name, each) for name, each in network.named_modules() if isinstance(each, kind)]
    handles = [each.register_forward_pre_hook(partial(note, name)) for name, each in modules]
    with torch.no_grad():
        network(example)
    for handle in handles:
        handle.remove()
    return {name: found[0] for name, found in sides.items() if len(found) == 1}


def _convolutions_before_norms(
    network: nn.Module, *example: Tensor
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    # By the id of the output, which is kept so that no other tensor takes that id.
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = (module, output)
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])][0], module))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    with torch.no_grad():
        network(*example)
    for handle in handles:
        handle.remove()
    return pairs


def _differ(plain: nn.Module, fused: nn.Module, *example: Tensor) -> bool:
    with torch.no_grad():
        expected, given = plain(*example), fused(*example)
    if isinstance(expected, Tensor):
        expected, given = [expected], [given]
    pairs = zip(expected, given, strict=True)
    return any(bool((e - g).abs().max() > _TOLERANCE * e.abs().max()) for e, g in pairs)


def draw_example(*shape: int) -> Tensor:
    """A batch of one, always the same; the global random state is not touched."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
