"""The frozen feature extractor (stage 2 of the paper, first half).

The paper's is an ImageNet ResNet-50; any timm network with maps at strides 4, 8 and 16 will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import BackboneSettings
from almrr_pipeline.model.weights_io import load_weights, read_weights

STRIDES = (4, 8, 16)
"""Pixels of the image per cell of each feature map: stages 1 to 3 of a ResNet, as in the paper."""


class Backbone(nn.Module):
    """A frozen feature extractor: always in evaluation mode, without gradients.

    The authors' code computed gradients through it and did not use them; here no activation is
    kept either.

    Attributes:
        channels: channels of the three maps.
        mean, std: the normalization of RGB in [0, 1] of the network's training, (1, 3, 1, 1).
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
        # The normalization belongs to the network, not to the data: a port of DRAEM that blended
        # anomalies after it lost most of its accuracy.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the batch statistics of a frozen network must not change."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """RGB in [0, 1] (B, 3, H, W) -> three maps (B, channels[i], H / s, W / s), s = 4, 8, 16."""
        return list(self.network((images - self.mean) / self.std))


def build_backbone(settings: BackboneSettings, *, weights: Path | None) -> Backbone:
    """Build a frozen backbone without access to a hub.

    Args:
        settings: name and options; its own `weights` and `sha256` are not read.
        weights: a .safetensors, .pth or .pt file with timm's tensor names in any float type;
            tensors of later stages and of the classifier are ignored. None leaves the weights
            random, for the caller to load.

    Raises:
        AlmrrError: timm has no such network, it has no maps at strides 4, 8, 16, an option does
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


def _create_network(settings: BackboneSettings) -> nn.Module:
    """Timm's feature extractor up to the stage at stride 16."""
    name, location = settings.name, settings.feature_location
    if not timm.is_model(name.split(".")[0]):
        version = timm.__version__
        raise AlmrrError(f"backbone.name: timm {version} has no network {name!r}; choose another.")
    # Only timm's EfficientNets have this keyword.
    options: dict[str, Any] = {} if location == "bottleneck" else {"feature_location": location}
    try:
        whole = timm.create_model(name, features_only=True, **options)
        reductions = _feature_info(whole).reduction()
        indices = tuple(reductions.index(stride) for stride in STRIDES)
        network = timm.create_model(name, features_only=True, out_indices=indices, **options)
    except TypeError:
        raise AlmrrError(
            f"backbone.feature_location: {name} has only 'bottleneck'; {location!r} is for "
            "EfficientNets."
        ) from None
    except (ValueError, RuntimeError, AttributeError) as error:
        raise AlmrrError(
            f"backbone.name: {name} has no feature maps at strides 4, 8 and 16 ({error}); "
            "choose another."
        ) from error
    blocks = getattr(network, "blocks", None)
    if isinstance(blocks, nn.Sequential):
        # timm's EfficientNets keep the stages after the last feature map, which are not used.
        network.blocks = blocks[: _feature_info(network).get("stage")[-1]]
    return network


def _move_strides(network: nn.Module, name: str) -> None:
    """Move the stride of a stage's first block from the 3x3 to the 1x1 convolution, as Caffe's."""
    for stage in ("layer2", "layer3"):
        block: Any = next(iter(getattr(network, stage, [])), None)
        if not (hasattr(block, "conv3") and getattr(block.conv2, "stride", None) == (2, 2)):
            raise AlmrrError(
                f"backbone.stride_in_1x1 is for ResNets of bottleneck blocks, not for {name}; "
                "leave it false."
            )
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def _feature_info(network: nn.Module) -> Any:  # noqa: ANN401 (timm's FeatureInfo is not typed)
    return network.feature_info
