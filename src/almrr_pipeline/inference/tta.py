"""The mean of the anomaly maps of an image and of its mirror images: steadier, at four times the work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS, _COLUMNS = -2, -1
_MIRRORS = ((), (_COLUMNS,), (_ROWS,), (_ROWS, _COLUMNS))


class FlipAveraged(nn.Module):
    """Maps an image and its three mirror images, each by itself, and averages what comes back, mirrored back.

    A training with `train.flips` asks for maps that are mirrored with the image; what a network of finite training
    gives differs a little from mirror to mirror, and the mean keeps what they agree on.

    Args:
        model: takes float32 in [0, 1] of shape (B, 3, H, W), returns (B, H, W) in [0, 1].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Map images.

        Args:
            images: float32 in [0, 1], shape (B, 3, H, W).

        Returns:
            float32 in [0, 1], shape (B, H, W).
        """
        maps = [self.model(images.flip(mirror)).flip(mirror) for mirror in _MIRRORS]
        return torch.stack(maps).mean(0)


def average_flips(model: nn.Module, flips: bool) -> nn.Module:
    """The model itself, or the model with its maps averaged over mirror images where `flips`."""
    return FlipAveraged(model) if flips else model
