"""The frozen network whose features are repaired (stage 2 of the paper, first half).

The paper takes an ImageNet ResNet-50; any timm network with feature maps at strides 4, 8 and 16 serves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import BackboneSettings

STRIDES = (4, 8, 16)
"""Pixels of the image per cell of each feature map: stages 1 to 3 of a ResNet."""
_logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """A frozen feature extractor: never trained, always in evaluation mode, and no gradient passes through it.

    The authors' code computed gradients through it for nothing; here no activation is kept either.

    Attributes:
        channels: channels of the three maps.
        mean, std: the normalization of RGB in [0, 1] that the network was trained with, shape (1, 3, 1, 1).
        settings: what `build_backbone` needs, besides the weights, to build it again.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        settings: BackboneSettings,
        channels: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.network = network
        self.channels = channels
        self.settings = settings
        # The normalization belongs to the network, not to the data: a port of DRAEM that blended anomalies after it
        # lost most of its accuracy.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked: batch statistics of a frozen network must not drift."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract features.

        Args:
            images: RGB, float in [0, 1], shape (B, 3, H, W).

        Returns:
            Three maps (B, channels[i], H / s, W / s) for s = 4, 8, 16.
        """
        return list(self.network((images - self.mean) / self.std))


def build_backbone(settings: BackboneSettings, *, weights: Path | None) -> Backbone:
    """Build a frozen backbone; no hub is asked.

    Args:
        settings: name and options; its own `weights` and `sha256` are not read.
        weights: a .safetensors, .pth or .pt file with timm's tensor names in any float type;
            tensors of later stages and of the classifier are ignored. None leaves the weights
            random, for the caller to load.

    Raises:
        AlmrrError: timm knows no such network, it has no maps at strides 4, 8, 16, an option does
            not fit it, or the file does not hold its weights.
    """
    network = _create_network(settings)
    if settings.stride_in_1x1:
        _move_strides(network, settings.name)
    if weights is not None:
        load_weights(network, read_weights(weights), origin=str(weights))
    first, second, third = _feature_info(network).channels()
    pretrained: Any = network.pretrained_cfg
    return Backbone(
        network,
        settings=settings,
        channels=(first, second, third),
        mean=pretrained["mean"],
        std=pretrained["std"],
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a .safetensors, .pth or .pt file, on the CPU, in the file's own types.

    Raises:
        AlmrrError: the file is missing or holds no such tensors.
    """
    if not path.is_file():
        raise AlmrrError(f"There are no weights at {path}; check backbone.weights.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever a file that is no archive leads it to
        raise AlmrrError(
            f"{path} cannot be read as weights ({error}); give a .safetensors, .pth or .pt file."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise AlmrrError(f"{path} holds no dictionary of tensors; save the network's state_dict alone.")
    return content


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Load every tensor the network has; what the file has beyond them belongs to later stages and is left out.

    Raises:
        AlmrrError: tensors are missing or have other shapes; says which.
    """
    own = network.state_dict()
    # A batch norm's step counter is absent from older files, and plays no role in a frozen network.
    needed = {name: tensor for name, tensor in own.items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in needed if name not in tensors]
    differing = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in needed.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if missing or differing:
        complaints = [f"{len(missing)} tensors are missing ({_some(missing)})"] * bool(missing)
        complaints += [f"{len(differing)} have another shape ({_some(differing)})"] * bool(differing)
        raise AlmrrError(
            f"{origin} does not hold this network's weights: {'; '.join(complaints)}. Check backbone.name."
        )
    network.load_state_dict({name: tensors.get(name, tensor) for name, tensor in own.items()})
    _logger.debug("%d tensors loaded from %s", len(own), origin)


def _create_network(settings: BackboneSettings) -> nn.Module:
    """Timm's feature extractor, ending with the stage at stride 16."""
    name, feature_location = settings.name, settings.feature_location
    if not timm.is_model(name.split(".")[0]):
        raise AlmrrError(f"backbone.name: timm {timm.__version__} has no network {name!r}; see timm.list_models().")
    # timm offers the choice of the tap to its EfficientNets alone, by this keyword.
    options: dict[str, Any] = {} if feature_location == "bottleneck" else {"feature_location": feature_location}
    try:
        reductions = _feature_info(timm.create_model(name, features_only=True, **options)).reduction()
        indices = tuple(reductions.index(stride) for stride in STRIDES)
        network = timm.create_model(name, features_only=True, out_indices=indices, **options)
    except TypeError:
        raise AlmrrError(
            f"backbone.feature_location: {name} knows only 'bottleneck'; {feature_location!r} is for EfficientNets."
        ) from None
    except (ValueError, RuntimeError, AttributeError) as error:
        raise AlmrrError(
            f"backbone.name: {name} has no feature maps at strides 4, 8 and 16 ({error}); choose another."
        ) from error
    blocks = getattr(network, "blocks", None)
    if isinstance(blocks, nn.Sequential):
        # timm's EfficientNets keep the stages after the last tap; nothing needs them.
        network.blocks = blocks[: _feature_info(network).get("stage")[-1]]
    return network


def _move_strides(network: nn.Module, name: str) -> None:
    """Move the stride of each stage's first block from its 3x3 to its 1x1 convolution, as in Caffe's ResNets."""
    for stage in ("layer2", "layer3"):
        block: Any = next(iter(getattr(network, stage, [])), None)
        if not (hasattr(block, "conv3") and getattr(block.conv2, "stride", None) == (2, 2)):
            raise AlmrrError(
                f"backbone.stride_in_1x1 is for ResNets of bottleneck blocks; {name} is none, leave it false."
            )
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def _feature_info(network: nn.Module) -> Any:  # noqa: ANN401 (timm's FeatureInfo, which is not typed)
    return network.feature_info


def _some(items: Sequence[str]) -> str:
    """The first few of many."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
