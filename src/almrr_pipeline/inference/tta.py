"""Test-time augmentation: the mean anomaly map of an image and its three flips."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS, _COLUMNS = -2, -1
_FLIPS = ((), (_COLUMNS,), (_ROWS,), (_ROWS, _COLUMNS))


class FlipAveraged(nn.Module):
    """A network whose maps are averaged over flips, at four times the work.

    A training with `train.flips` asks for maps that flip with the image; those of a network of
    finite training differ a little from flip to flip, and the mean keeps what they agree on.

    Args:
        model: takes float32 in [0, 1] of shape (B, 3, H, W), returns (B, H, W) in [0, 1].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Map each flip, flip back, and average: (B, 3, H, W) -> (B, H, W), both in [0, 1]."""
        # One pass over all flips: a graph that is exported holds the network once.
        maps = self.model(torch.cat([images.flip(axes) for axes in _FLIPS]))  # (4 B, H, W)
        maps = maps.unflatten(0, (len(_FLIPS), -1))  # (4, B, H, W)
        return torch.stack([maps[i].flip(axes) for i, axes in enumerate(_FLIPS)]).mean(0)


def average_flips(model: nn.Module, flips: bool) -> nn.Module:
    """Wrap a model in `FlipAveraged` if `flips`, else return it as it is."""
    return FlipAveraged(model) if flips else model
