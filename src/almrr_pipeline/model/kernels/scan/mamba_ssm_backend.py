"""The selective scan by mamba-ssm's fused CUDA kernel (Gu and Dao, arXiv 2312.00752; Apache-2.0).

That kernel takes channels before time and one direction: inputs are passed as transposed views (it
copies what it needs contiguous) and, for the reverse direction, flipped.
"""

# ruff: noqa: N806 - names are those of the formulas
from __future__ import annotations

import importlib

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

from almrr_pipeline.model.kernels.scan.operands import ScanOperands

# mamba_ssm imports without its compiled kernel, and only the first scan would fail.
importlib.import_module("selective_scan_cuda")


def scan_with_mamba_ssm(scan: ScanOperands) -> Tensor:
    """`selective_scan` by mamba-ssm; parameters and states are float32."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = scan
    out: Tensor = selective_scan_fn(
        _channels_first(u, u, reverse),
        _channels_first(delta, u, reverse),
        A.float(),
        _channels_first(B, u, reverse),
        _channels_first(C, u, reverse),
        D.float(),
        z=None if z is None else _channels_first(z, u, reverse),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=False,
    )
    out = out.transpose(1, 2)
    return out.flip(1) if reverse else out


def _channels_first(tensor: Tensor, like: Tensor, reverse: bool) -> Tensor:
    """(b, l, d) to (b, d, l), in the dtype of `like`: the kernel takes one dtype for all inputs."""
    return (tensor.flip(1) if reverse else tensor).to(like.dtype).transpose(1, 2)
