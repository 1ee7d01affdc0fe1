"""Fused kernels of the selective scan as torch operators: one node of a graph, with gradients.

torch.compile, torch.export and fake tensors see `almrr::scan`, its shapes and its gradient
`almrr::scan_backward`; the kernels are those of the module `triton_backend` or `numba_backend`.
"""

# ruff: noqa: ANN401 - autograd's ctx has no type
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from almrr_pipeline.model.kernels.scan.operands import ScanOperands

_OPERANDS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, bool reverse"
)


def scan_fused(scan: ScanOperands, backend: str) -> Tensor:
    """`selective_scan` in float32 by the kernels of `triton` or `numba`; differentiable once."""
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in scan[:8])
    return _scan(*scan, keep, backend)[0]  # type: ignore[no-any-return]


def _kernels(backend: str) -> Any:
    return importlib.import_module(f"{__package__}.{backend}_backend")


def _run_forward(*given: Any) -> tuple[Tensor, Tensor]:
    *operands, keep, backend = given
    return _kernels(backend).scan_forward(ScanOperands(*operands), keep=keep)  # type: ignore[no-any-return]


def _run_backward(g: Tensor, starts: Tensor, *given: Any) -> list[Tensor]:
    *operands, backend = given
    gradients = _kernels(backend).scan_backward(ScanOperands(*operands), g, starts)
    return [gradient for gradient in gradients if gradient is not None]


_scan = torch.library.custom_op(
    "almrr::scan",
    _run_forward,
    mutates_args=(),
    schema=f"({_OPERANDS}, bool keep, str backend) -> (Tensor, Tensor)",
)
_scan_backward = torch.library.custom_op(
    "almrr::scan_backward",
    _run_backward,
    mutates_args=(),
    schema=f"(Tensor g, Tensor starts, {_OPERANDS}, str backend) -> Tensor[]",
)


@_scan.register_fake
def _shape_forward(*given: Any) -> tuple[Tensor, Tensor]:
    u, _, A, *_, keep, backend = given  # noqa: N806 - name of the formulas
    starts = _kernels(backend).starts_shape(*u.shape, A.shape[1], keep=keep)
    return u.new_empty(u.shape), u.new_empty(starts, dtype=torch.float32)


@_scan_backward.register_fake
def _shape_backward(_g: Tensor, _starts: Tensor, *given: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in given[:8] if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.flags, ctx.backend = inputs[8:10], inputs[11]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, g: Tensor, _starts: Tensor | None) -> tuple[Tensor | None, ...]:
    *operands, starts = ctx.saved_tensors
    gradients = iter(_scan_backward(g, starts, *operands, *ctx.flags, ctx.backend))
    return (*(None if t is None else next(gradients) for t in operands), None, None, None, None)


_scan.register_autograd(_differentiate, setup_context=_save)
