"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752, section 3) behind one signature, and its backends.

    name        runs on   what it is
    mamba_ssm   CUDA      mamba-ssm's fused kernel; an extra that its users compile
    triton      CUDA      ours; torch brings Triton on Linux (on a CPU too, slowly, with TRITON_INTERPRET=1)
    numba       CPU       ours, fused; needs no compiler
    torch       anything  the reference, with a hand-written backward
    parallel    anything  few tensor operations, for torch.export and ONNX; never chosen outside of an export

`auto` takes the fastest that is present, says once in the log which, and takes `parallel` while a graph is exported. A
backend that was named is used, or its absence is an error.
"""

# ruff: noqa: N803 - names are those of the formulas
from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.model.kernels.scan.operands import ScanOperands
from almrr_pipeline.model.kernels.scan.reference import convolve_with_torch

_LOG = logging.getLogger(__name__)

BACKENDS = ("mamba_ssm", "triton", "numba", "torch")
"""What a user may name, besides `auto`."""

_FUNCTIONS = {
    "mamba_ssm": ("mamba_ssm_backend", "scan_with_mamba_ssm"),
    "triton": ("triton_backend", "scan_with_triton"),
    "numba": ("numba_backend", "scan_with_numba"),
    "torch": ("reference", "scan_with_torch"),
    "parallel": ("parallel", "scan_in_parallel"),
}
# On CUDA ours comes first: mamba-ssm's kernel needs every tensor transposed, and flipped for the reverse direction,
# which moves more memory than the scan itself; and its atomic sums make gradients differ from run to run.
_PREFERENCE = {"cuda": ("triton", "mamba_ssm"), "cpu": ("numba",)}
_REMEDY = {
    "mamba_ssm": (
        "its kernel is compiled on your machine, which takes nvcc of torch's own CUDA version and many minutes: "
        "`MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm`"
    ),
    "triton": "it comes with torch on Linux and needs a CUDA GPU (TRITON_INTERPRET=1 runs it on a CPU, for tests)",
    "numba": "`pip install numba`",
}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The selective state space recurrence along the tokens, its skip and its gate; differentiable once.

        dt_t = softplus(delta_t + delta_bias)
        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        h of shape (d, n), zero before the first token
        out_t = (C_t h_t + D u_t) silu(z_t)

    Any strides, any floating dtype; the arithmetic is float32 (float64 for float64 in `torch` and `parallel`).

    Args:
        u: input, (b, l, d): images, tokens, channels.
        delta: step sizes before bias and softplus, (b, l, d).
        A: state matrix, diagonal, negative, (d, n).
        B: input matrix, one for all channels of a token, (b, l, n).
        C: output matrix, likewise, (b, l, n).
        D: skip, (d,).
        z: gate, (b, l, d); without it there is no gate.
        delta_bias: (d,); without it there is none.
        delta_softplus: whether step sizes go through a softplus.
        reverse: scan from the last token to the first (no tensor is flipped for it).
        backend: `auto` or a name of the table above.

    Returns:
        (b, l, d), in the dtype of u.

    Raises:
        ValueError: shapes that do not fit.
        AlmrrError: the named backend is unknown, absent, or cannot run on the tensors' device.
    """
    operands = ScanOperands(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    operands.check()
    run = _run_uncompiled if torch.compiler.is_compiling() and not _is_exporting() else _run
    return run(backend, operands)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False, backend: str = "auto") -> Tensor:
    """The causal depthwise convolution and SiLU in front of a scan: silu(bias + sum over k of weight_k x_{t-K+1+k}).

    With `numba` as the (resolved) backend one fused kernel, otherwise torch operations, which torch.compile fuses and
    an export can hold. Channels stay innermost in both.

    Args:
        x: (b, l, d).
        weight: (d, K); its last column belongs to the token itself.
        bias: (d,).
        reverse: the window lies after the token, mirrored: what a flip of x before and of the result after would give.
        backend: as for `selective_scan`.

    Returns:
        (b, l, d), in the dtype of x.
    """
    if torch.compiler.is_compiling() or resolve_backend(backend, x.device) != "numba":
        return convolve_with_torch(x, weight, bias, reverse=reverse)
    from almrr_pipeline.model.kernels.scan.numba_backend import convolve_with_numba

    return convolve_with_numba(x, weight, bias, reverse=reverse)


def available_backends() -> dict[str, str]:
    """Each backend that may be named, with "" if it can be used here and otherwise the reason why not."""
    return {name: _why_absent(name) for name in BACKENDS}


def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that runs on `device` for this name.

    Raises:
        AlmrrError: the name is unknown, the backend is absent (says how to get it), or it cannot run on the device.
    """
    kind = torch.device(device).type
    if name == "auto":
        return "parallel" if _is_exporting() else _choose(kind)
    if name not in _FUNCTIONS:
        raise AlmrrError(f"There is no scan backend {name!r}; take one of auto, {', '.join(BACKENDS)}.")
    reason = _why_absent(name)
    if reason:
        raise AlmrrError(f"The scan backend {name} cannot be used here: {reason}. To get it: {_REMEDY[name]}.")
    if kind not in _devices(name):
        raise AlmrrError(
            f"The scan backend {name} does not run on {kind}, only on {' and '.join(_devices(name))}; "
            "set scan.backend to auto or torch."
        )
    return name


@cache
def _choose(kind: str) -> str:
    """The fastest backend present for a kind of device; cached, so that it is logged once."""
    present = [name for name in _PREFERENCE.get(kind, ()) if not _why_absent(name)]
    chosen = present[0] if present else "torch"
    _LOG.info("Selective scan on %s: backend %s (scan.backend names another).", kind, chosen)
    return chosen


@cache
def _why_absent(name: str) -> str:
    if name == "mamba_ssm" and not torch.cuda.is_available():
        return "it needs a CUDA GPU and there is none"
    try:
        importlib.import_module(f"{__name__}.{_FUNCTIONS[name][0]}")
    except ImportError as error:
        return f"it cannot be imported ({error})"
    if name == "triton" and not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA GPU"
    return ""


def _devices(name: str) -> tuple[str, ...]:
    """Kinds of devices that a backend runs on."""
    if name in ("torch", "parallel"):
        return "cpu", "cuda", "mps", "xpu"
    if name == "triton" and _interpreted():
        return "cpu", "cuda"
    return ("cpu",) if name == "numba" else ("cuda",)


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU; read by Triton when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_exporting() -> bool:
    """torch.export, or either of the two ways to ONNX."""
    exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
    return exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


@cache
def _function(name: str) -> Callable[[ScanOperands], Tensor]:
    module, function = _FUNCTIONS[name]
    scan: Callable[[ScanOperands], Tensor] = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return scan


def _run(backend: str, operands: ScanOperands) -> Tensor:
    return _function(resolve_backend(backend, operands.u.device))(operands)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run_uncompiled(backend: str, operands: ScanOperands) -> Tensor:
    """For torch.compile: the kernels are compiled already, and the reference's loop would unroll."""
    return _run(backend, operands)
