"""Bilinear resizing (align_corners=True) and what follows it linearly, written as a product with two small matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def bilinear_matrix(source: int, size: int) -> Tensor:
    """The matrix of a linear resize with align_corners=True.

    Returns:
        float64, shape (size, source); each row sums to 1.
    """
    unit = torch.eye(source, dtype=torch.float64)[None]  # (1, source as channels, source)
    return F.interpolate(unit, size=size, mode="linear", align_corners=True)[0].T  # (size, source)


def resize_and_pool_matrix(source: int, size: int, pool: int) -> Tensor:
    """The matrix of that resize followed by a mean over every `pool` positions.

    Args:
        source: length of the input.
        size: length after resizing; a multiple of `pool`.
        pool: length and stride of the mean.

    Returns:
        float32, rounded from float64, shape (size / pool, source); each row sums to 1.
    """
    return bilinear_matrix(source, size).view(size // pool, pool, source).mean(1).float()


def apply_separably(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute rows @ x @ columns^T for every channel, without leaving the memory format of x.

    Args:
        x: (B, C, n, m).
        rows: (h, n).
        columns: (w, m).

    Returns:
        (B, C, h, w).
    """
    if not is_channels_last(x):
        return rows @ (x @ columns.T)  # (B, C, n, w), then (B, C, h, w)
    batch, channels, n, m = x.shape
    x = x.permute(0, 2, 3, 1)  # (B, n, m, C): channels innermost, so that both products are of long rows
    x = rows @ x.reshape(batch, n, m * channels)  # (B, h, m C)
    x = columns @ x.view(batch, len(rows), m, channels)  # (B, h, w, C)
    return x.permute(0, 3, 1, 2)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of (B, C, h, w) lie innermost in memory, and only they."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
