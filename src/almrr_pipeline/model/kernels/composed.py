"""Linear operations as matrices: resizing, with pooling or not, and the MFRM's two convolutions."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize with align_corners=True: (B, C, n, m) -> (B, C, *size), in the dtype of x.

    On CUDA two products with constant matrices: the backward pass of `F.interpolate` adds there in
    an order that changes from run to run, or is many operations where it must not.
    """
    if x.device.type != "cuda":
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    # A kept matrix must be no part of a graph and no fake tensor.
    keep = not torch.compiler.is_compiling() and type(x) in (Tensor, nn.Parameter)
    make = _kept_matrix if keep else _make_matrix
    rows, columns = (
        make(length, target, x.device, x.dtype)
        for length, target in zip(x.shape[2:], size, strict=True)
    )
    with torch.autocast("cuda", enabled=False):  # float32, such as probabilities, stays float32
        return apply_separably(x, rows, columns)


@cache
def _kept_matrix(length: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the next caller may differentiate
        # From the host's memory: a copy that is complete for all streams.
        return bilinear_matrix(length, size).to(dtype).to(device)


def _make_matrix(length: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return bilinear_matrix(length, size, device).to(dtype)


def bilinear_matrix(length: int, size: int, device: torch.device | None = None) -> Tensor:
    """Linear resize with align_corners=True: float64 (size, length), each row sums to 1."""
    # (1, length as channels, length)
    unit = torch.eye(length, dtype=torch.float64, device=device)[None]
    return F.interpolate(unit, size=size, mode="linear", align_corners=True)[0].T  # (size, length)


def resize_and_pool_matrix(length: int, size: int, pool: int) -> Tensor:
    """That resize, then the mean over every `pool` positions: float32 (size / pool, length)."""
    return bilinear_matrix(length, size).view(size // pool, pool, length).mean(1).float()


def apply_separably(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Product rows (h, n) @ x (B, C, n, m) @ columns^T (m, w), in the memory format of x."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return rows @ (x @ columns.T)  # (B, C, n, w), then (B, C, h, w)
    batch, channels, n, m = x.shape
    x = x.permute(0, 2, 3, 1)  # (B, n, m, C): with channels innermost both products have long rows
    x = rows @ x.reshape(batch, n, m * channels)  # (B, h, m C)
    x = columns @ x.view(batch, len(rows), m, channels)  # (B, h, w, C)
    return x.permute(0, 3, 1, 2)


def compose_convolutions(
    reduce: nn.Conv2d, embedding: nn.Conv2d, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Weight (dim, C, patch, patch) and bias (dim,) of `embedding` after the 1x1 `reduce`.

    Gradients pass to both. Computed in `dtype`, or else in that of the parameters.
    """
    assert reduce.bias is not None
    assert embedding.bias is not None
    inner = reduce.weight.flatten(1).to(dtype=dtype)  # (latent, C)
    outer = embedding.weight.to(dtype=dtype)  # (dim, latent, patch, patch)
    weight = torch.einsum("dlyx,lc->dcyx", outer, inner)
    bias = outer.sum((2, 3)) @ reduce.bias.to(dtype=dtype)
    return weight, bias + embedding.bias.to(dtype=dtype)


def composing_pays(reduce: nn.Conv2d, embedding: nn.Conv2d, *, cells: int) -> bool:
    """Whether a training step takes fewer multiplications with the convolutions composed.

    Saved for each of the batch's `cells`, forward and for the gradient of the weights; spent on the
    weights, once forward and twice backward. It pays from a batch of 2 at the paper's widths.
    """
    dim, latent, patch, _ = embedding.weight.shape
    channels = reduce.in_channels
    saved = cells * (latent * channels + latent * dim - channels * dim)
    return 2 * saved > 3 * dim * patch * patch * latent * channels
