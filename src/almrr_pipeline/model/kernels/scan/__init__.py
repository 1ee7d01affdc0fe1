"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752, section 3) and its backends.

    name        runs on   what it is
    mamba_ssm   CUDA      mamba-ssm's fused kernel; an extra that its users compile
    triton      CUDA      ours; torch brings Triton on Linux (TRITON_INTERPRET=1: on a CPU, slowly)
    numba       CPU       ours, fused; needs no compiler
    torch       anything  the reference, with a hand-written backward
    parallel    anything  few tensor operations, for exported and compiled graphs and other devices
    onnx        -         one `Scan` node of a graph that is exported to ONNX

`auto` takes the fastest that is present and logs which once; `parallel` while a graph is exported.
A backend requested by name is used, or its absence is an error; under torch.compile `torch` is
`parallel`, because its loop over the tokens would be unrolled.
"""

# ruff: noqa: N803 - names are those of the formulas
from __future__ import annotations

import importlib
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import ScanBackend
from almrr_pipeline.model.kernels.scan.fused import scan_fused
from almrr_pipeline.model.kernels.scan.operands import ScanOperands
from almrr_pipeline.model.kernels.scan.parallel import scan_in_parallel
from almrr_pipeline.model.kernels.scan.reference import convolve_with_torch, scan_with_torch

_LOG = logging.getLogger(__name__)

BACKENDS = tuple(name for name in get_args(ScanBackend) if name != "auto")
"""What a user may name besides `auto`."""


class _Implementation(NamedTuple):
    """The types of devices a backend runs on, and how to get it."""

    devices: tuple[str, ...]
    remedy: str = ""


_ANY_DEVICE = ("cpu", "cuda", "mps", "xpu")
_IMPLEMENTATIONS = {
    "mamba_ssm": _Implementation(
        ("cuda",),
        "`pip install packaging ninja wheel`, then `MAMBA_KEEP_CUDA_BUILD=TRUE pip install "
        "--no-build-isolation mamba-ssm`; where its authors offer no wheel for this torch, that "
        "compiles its CUDA kernel for many minutes and takes nvcc of torch's CUDA version. Its "
        "setup.py asks for C++17, but the newest torch for C++20",
    ),
    "triton": _Implementation(
        ("cuda",),
        "it comes with torch on Linux and needs a CUDA GPU, a C compiler and Python's headers "
        "(`apt install gcc python3-dev`), or TRITON_INTERPRET=1 for tests",
    ),
    "numba": _Implementation(("cpu",), "`pip install numba`"),
    "torch": _Implementation(_ANY_DEVICE),
    "parallel": _Implementation(_ANY_DEVICE),
    "onnx": _Implementation(_ANY_DEVICE, "`pip install 'almrr-pipeline[onnx]'`"),
}
# On CUDA ours comes first: mamba-ssm's kernel needs every tensor transposed, and flipped for the
# reverse direction, which moves more memory than the scan itself; and its atomic sums make
# gradients differ from run to run.
_PREFERENCE = {"cuda": ("triton", "mamba_ssm"), "cpu": ("numba",)}


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
    """Selective state space recurrence along the tokens, with skip and gate; differentiable once.

        dt_t = softplus(delta_t + delta_bias)
        h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t        h of shape (d, n), zero before the first
        out_t = (C_t h_t + D u_t) silu(z_t)

    Any strides, any floating dtype; the arithmetic is float32, or float64 for float64 in `torch`
    and `parallel`. b: images, l: tokens, d: channels, n: states per channel.

    Args:
        u: input, (b, l, d).
        delta: step sizes before bias and softplus, (b, l, d).
        A: state matrix, diagonal, negative, (d, n).
        B: input matrix, shared by the channels of a token, (b, l, n).
        C: output matrix, likewise, (b, l, n).
        D: skip, (d,).
        z: gate, (b, l, d); None for no gate.
        delta_bias: (d,); None for none.
        delta_softplus: whether step sizes pass through a softplus.
        reverse: scan from the last token to the first (no tensor is flipped for it).
        backend: `auto` or a name of the table above.

    Returns:
        (b, l, d), in the dtype of u.

    Raises:
        ValueError: shapes do not fit.
        AlmrrError: the backend is unknown, absent, or cannot run on the tensors' device.
    """
    operands = ScanOperands(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    operands.check()
    name = resolve_backend(backend, u.device.type)
    if name in ("triton", "numba"):
        return scan_fused(operands, name)
    if name == "mamba_ssm":
        return _scan_with_mamba_ssm(operands)  # type: ignore[no-any-return]
    if name == "onnx":
        from almrr_pipeline.model.kernels.scan.onnx_backend import scan_with_onnx

        return scan_with_onnx(operands)
    compiling = torch.compiler.is_compiling()
    scan = scan_in_parallel if name == "parallel" or compiling else scan_with_torch
    return scan(operands)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """Causal depthwise convolution and SiLU: silu(bias + sum over k of weight_k x_{t-K+1+k}).

    x (b, l, d) -> (b, l, d); weight (d, K), whose last column is the token's own; bias (d,).
    `reverse` and `backend` as for `selective_scan`. One fused kernel if the backend is `numba`;
    otherwise torch operations, which torch.compile fuses and an export can hold.
    """
    if torch.compiler.is_compiling() or resolve_backend(backend, x.device.type) != "numba":
        return convolve_with_torch(x, weight, bias, reverse=reverse)
    from almrr_pipeline.model.kernels.scan.numba_backend import convolve_with_numba

    return convolve_with_numba(x, weight, bias, reverse=reverse)


# Not traced: it imports, caches and logs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resolve_backend(name: str, device: torch.device | str) -> str:
    """The backend that runs on `device` for this name.

    Raises:
        AlmrrError: the name is unknown, the backend is absent (with how to install it), or it
            cannot run on the device.
    """
    device_type = torch.device(device).type
    if name == "auto":
        return "parallel" if _is_exporting() else _choose(device_type)
    if name not in _IMPLEMENTATIONS:
        names = ", ".join(get_args(ScanBackend))
        raise AlmrrError(f"There is no scan backend {name!r}; take one of {names}.")
    if reason := _why_absent(name):
        remedy = _IMPLEMENTATIONS[name].remedy
        raise AlmrrError(f"Scan backend {name} cannot be used here: {reason}. To get it: {remedy}.")
    devices = _IMPLEMENTATIONS[name].devices
    if name == "triton" and _interpreted():
        devices = ("cpu", *devices)
    if device_type not in devices:
        raise AlmrrError(
            f"The scan backend {name} does not run on {device_type}, only on "
            f"{' and '.join(devices)}; set inference.scan_backend to auto or torch."
        )
    return name


@cache
def _choose(device_type: str) -> str:
    """The fastest backend present for a type of device; cached, so that it is logged once."""
    present = [name for name in _PREFERENCE.get(device_type, ()) if not _why_absent(name)]
    # The loop of `torch` issues thousands of operations, which a CPU alone does not mind.
    chosen = present[0] if present else "torch" if device_type == "cpu" else "parallel"
    message = "Selective scan on %s: backend %s (inference.scan_backend sets another)."
    _LOG.info(message, device_type, chosen)
    return chosen


@cache
def _why_absent(name: str) -> str:
    if name in ("torch", "parallel"):
        return ""
    if name == "mamba_ssm" and not torch.cuda.is_available():
        return "it needs a CUDA GPU and there is none"
    try:
        importlib.import_module(f"{__name__}.{name}_backend")
    except ImportError as error:
        return f"it cannot be imported ({error})"
    if name == "triton" and not _interpreted():
        return _why_not_compiling() if torch.cuda.is_available() else "there is no CUDA GPU"
    return ""


def _why_not_compiling() -> str:
    """What Triton lacks for the module that it compiles at the first launch (triton.runtime)."""
    names = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    if not any(map(shutil.which, names)):
        return f"there is no C compiler ({' or '.join(names)})"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.is_file() else f"there is no Python.h in {header.parent}"


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU; Triton reads it when imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_exporting() -> bool:
    """Whether torch.export or either of the two ways to ONNX is tracing."""
    exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
    return exporting() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _scan_with_mamba_ssm(operands: ScanOperands) -> Tensor:
    from almrr_pipeline.model.kernels.scan.mamba_ssm_backend import scan_with_mamba_ssm

    return scan_with_mamba_ssm(operands)
