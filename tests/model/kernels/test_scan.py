"""Every scan backend against a loop that computes the recurrence one number at a time."""

# ruff: noqa: N803, E741 - names are those of the formulas
from __future__ import annotations

import importlib
import logging
import math
import multiprocessing
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import ScanBackend
from almrr_pipeline.model.kernels import scan
from almrr_pipeline.model.kernels.scan import (
    causal_conv,
    fused,
    resolve_backend,
    selective_scan,
)
from almrr_pipeline.model.kernels.scan.operands import ScanOperands

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_BACKENDS = [
    pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda")
    for name in ("torch", "triton", "mamba_ssm")
    if name != "mamba_ssm" or not scan._why_absent("mamba_ssm")
]
CPU_BACKENDS = (
    [("triton", "cpu")]
    if INTERPRETED
    else [(name, "cpu") for name in ("torch", "parallel", "numba")]
)
BACKENDS = [*(pytest.param(*pair, id="-".join(pair)) for pair in CPU_BACKENDS), *GPU_BACKENDS]
SHAPES = (
    [(1, 1, 3, 1), (1, 18, 11, 3)]
    if INTERPRETED
    else [(1, 1, 3, 1), (3, 7, 70, 2), (1, 63, 5, 3), (2, 257, 20, 16)]
)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@dataclass
class Case:
    """Arguments of a scan, and the gradient that comes back into it."""

    tensors: dict[str, Tensor]
    flags: dict[str, bool] = field(default_factory=dict)

    def run(self, function: Callable[..., Tensor], **kwargs: object) -> dict[str, Tensor]:
        """Output and the gradients of all tensors, by name."""
        leaves = {
            name: tensor.detach().clone().requires_grad_() for name, tensor in self.tensors.items()
        }
        positional = [leaves[name] for name in NAMES[:6]]
        optional = {name: leaves[name] for name in NAMES[6:] if name in leaves}
        out = function(*positional, **optional, **self.flags, **kwargs)
        weight = (
            torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
        )
        return {
            "out": out.detach(),
            **dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], weight), strict=True)),
        }

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        return Case(
            {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}, self.flags
        )


def draw_case(shape: tuple[int, int, int, int], seed: int = 0, **flags: bool) -> Case:
    """Tensors as in a network: step sizes of 0.001 to 1, decays from almost none to total."""
    (b, l, d, n), generator = shape, torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return Case(
        {
            "u": normal(b, l, d),
            "delta": normal(b, l, d),
            "A": -torch.exp(normal(d, n)),
            "B": normal(b, l, n),
            "C": normal(b, l, n),
            "D": normal(d),
            "z": normal(b, l, d),
            "delta_bias": normal(d) - 3,
        },
        flags,
    )


def scan_naively(
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
) -> Tensor:
    """The definition, by indexing; the gradients are autograd's."""
    length = u.shape[1]
    h = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype, device=u.device)
    outputs: list[Tensor] = [h] * length
    for t in reversed(range(length)) if reverse else range(length):
        step = delta[:, t] if delta_bias is None else delta[:, t] + delta_bias
        step = torch.log1p(torch.exp(step)) if delta_softplus else step
        h = torch.exp(step[:, :, None] * A) * h + (step * u[:, t])[:, :, None] * B[:, t, None, :]
        y = (h * C[:, t, None, :]).sum(-1) + D * u[:, t]
        outputs[t] = y if z is None else y * z[:, t] / (1 + torch.exp(-z[:, t]))
    return torch.stack(outputs, 1)


def assert_all_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float
) -> None:
    """Largest difference over the largest value by name, the unit of sums of many terms."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        difference = (got[name].double().cpu() - value.double().cpu()).abs().max()
        assert difference <= relative * value.abs().max(), (
            f"{name}: {difference / value.abs().max():.2e}"
        )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_equals_the_naive_loop(
    backend: str, device: str, reverse: bool, shape: tuple[int, int, int, int]
) -> None:
    case = draw_case(shape, reverse=reverse)
    expected = case.to(torch.float64).run(scan_naively)
    assert_all_close(
        case.to(torch.float32, device).run(selective_scan, backend=backend), expected, relative=3e-6
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_bfloat16_loses_only_the_rounding_of_what_it_returns(
    backend: str, device: str, reverse: bool
) -> None:
    case = draw_case((1, 4, 3, 2) if INTERPRETED else (3, 33, 70, 2), reverse=reverse).to(
        torch.bfloat16
    )
    expected = case.to(torch.float64).run(scan_naively)
    got = case.to(torch.bfloat16, device).run(selective_scan, backend=backend)
    assert {value.dtype for value in got.values()} == {torch.bfloat16}
    assert_all_close(
        got, expected, relative=2**-7 if INTERPRETED else 2**-8
    )  # the interpreter cuts instead of rounding


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("left_out", ["z", "delta_bias", "delta_softplus"])
def test_gate_bias_and_softplus_may_be_left_out(backend: str, device: str, left_out: str) -> None:
    case = draw_case((2, 7, 5, 3), delta_softplus=left_out != "delta_softplus")
    case.tensors.pop(left_out, None)
    if left_out == "delta_softplus":
        case.tensors["delta"] = (
            case.tensors["delta"].abs() + 3
        )  # plain step sizes are positive, the bias is about -3
    expected = case.to(torch.float64).run(scan_naively)
    assert_all_close(
        case.to(torch.float32, device).run(selective_scan, backend=backend),
        expected,
        relative=3e-4 if backend == "mamba_ssm" else 3e-6,  # fast exponentials: 1.1e-4
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_views_of_larger_tensors_are_taken_as_they_are(backend: str, device: str) -> None:
    case = draw_case((2, 7, 6, 4)).to(torch.float32, device)
    views = {name: tensor.clone() for name, tensor in case.tensors.items()}
    both = torch.cat([views["u"], views["z"]], -1)
    views["u"], views["z"] = both.chunk(2, -1)
    views["B"], views["C"] = torch.cat([views["B"], views["C"]], -1).split(4, -1)
    views["delta"] = (
        views["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    )  # channels not innermost
    views["D"] = views["D"].repeat_interleave(2)[::2]
    got = selective_scan(
        *(views[name] for name in NAMES[:6]),
        z=views["z"],
        delta_bias=views["delta_bias"],
        backend=backend,
    )
    torch.testing.assert_close(
        got, case.run(selective_scan, backend=backend)["out"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_extreme_step_sizes_stay_finite_and_exact(backend: str, device: str) -> None:
    if backend == "mamba_ssm":
        pytest.xfail("mamba-ssm's backward pass gives NaN where a gate is near exp(-100)")
    case = draw_case((1, 9, 8, 4))
    case.tensors["delta"] = torch.linspace(-60, 60, 72).reshape(1, 9, 8)
    case.tensors["z"] *= 40
    expected = case.to(torch.float64).run(scan_naively)
    assert_all_close(
        case.to(torch.float32, device).run(selective_scan, backend=backend), expected, relative=3e-6
    )


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_nan_is_not_swallowed(backend: str, device: str) -> None:
    case = draw_case((1, 9, 8, 4)).to(torch.float32, device)
    case.tensors["delta"][0, 4, 2] = math.nan
    out = case.run(selective_scan, backend=backend)["out"]
    assert out[0, 4:, 2].isnan().all()
    assert not out[0, :4].isnan().any()
    assert not out[0, :, 3].isnan().any()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ["torch", "parallel"])
def test_gradients_in_float64(backend: str, reverse: bool) -> None:
    case = draw_case((2, 5, 3, 2)).to(torch.float64)
    inputs = [tensor.requires_grad_() for tensor in case.tensors.values()]

    def scan_all(*tensors: Tensor) -> Tensor:
        return selective_scan(
            *tensors[:6], z=tensors[6], delta_bias=tensors[7], reverse=reverse, backend=backend
        )

    assert torch.autograd.gradcheck(scan_all, inputs)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_autocast_does_not_reach_the_recurrence(backend: str) -> None:
    case = draw_case((2, 63, 20, 16))

    def scan_under_autocast(*tensors: Tensor, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return selective_scan(*tensors, **kwargs, backend=backend)

    assert_all_close(
        case.run(scan_under_autocast), case.run(selective_scan, backend=backend), relative=0
    )


def test_threads_do_not_change_a_bit(set_torch_threads: Callable[[int], None]) -> None:
    case, results = draw_case((3, 20, 150, 16)), []
    for count in (1, 2, 3, 5):
        set_torch_threads(count)
        results.append(case.run(selective_scan, backend="numba"))
    for result in results[1:]:
        assert_all_close(result, results[0], relative=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_cpu_kernels_in_bfloat16_are_those_in_float32_rounded(reverse: bool) -> None:
    """To the bit, forward and backward: nothing but what they read and write is bfloat16."""
    torch.manual_seed(5)
    x, delta, z, slope = (torch.randn(2, 9, 70).bfloat16() for _ in range(4))
    A, B, C = -torch.rand(70, 3), torch.randn(2, 9, 3), torch.randn(2, 9, 3)  # noqa: N806
    weight, vector = torch.randn(70, 4).requires_grad_(), torch.randn(70).requires_grad_()

    def run(dtype: torch.dtype) -> list[Tensor]:
        read = [each.to(dtype).requires_grad_() for each in (x, delta, z)]
        u = causal_conv(read[0], weight, vector, reverse=reverse, backend="numba")
        operands = (read[1], A, B, C, vector)
        out = selective_scan(
            u.to(torch.bfloat16).to(dtype), *operands, z=read[2], reverse=reverse, backend="numba"
        )
        assert u.dtype == out.dtype == dtype
        convolved = torch.autograd.grad(u, [read[0], weight, vector], slope.to(dtype), True)
        scanned = torch.autograd.grad(out, [*read[1:], vector], slope.to(dtype))
        return [each.detach().bfloat16() for each in (u, out, *convolved, *scanned)]

    pairs = zip(run(torch.bfloat16), run(torch.float32), strict=True)
    assert all(torch.equal(half, full) for half, full in pairs)


def test_two_python_threads_may_scan_at_once() -> None:
    case = draw_case((2, 63, 70, 16))
    alone = case.run(selective_scan, backend="numba")
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(case.run, selective_scan, backend="numba") for _ in range(8)]
    for future in futures:
        assert_all_close(future.result(), alone, relative=0)


@pytest.mark.skipif(not INTERPRETED, reason="runs with the interpreter's tests")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("spans", [1, 2, 4])
def test_triton_cpu_carries_states_over_spans(
    spans: int, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five tiles in one, two uneven, or four spans, the last of which is empty."""
    from almrr_pipeline.model.kernels.scan import triton_backend

    monkeypatch.setattr(triton_backend, "_PROGRAMS", spans)
    monkeypatch.setattr(triton_backend, "_TILE", 2)
    case = draw_case((1, 9, 3, 3), reverse=reverse)
    assert triton_backend._count_spans(case.tensors["u"], 3) == spans
    case.tensors["delta_bias"] += 2.5  # nearly nothing is forgotten within a span
    expected = case.to(torch.float64).run(scan_naively)
    got = case.run(selective_scan, backend="triton")
    assert_all_close(got, expected, relative=3e-6)


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork on this system"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_scans_with_threads_of_its_own(
    set_torch_threads: Callable[[int], None],
) -> None:
    case = draw_case((2, 9, 70, 4))
    set_torch_threads(2)
    expected = case.run(selective_scan, backend="numba")["out"]

    def scan_again() -> None:
        tensors = [case.tensors[name] for name in NAMES]
        got = selective_scan(*tensors[:6], z=tensors[6], delta_bias=tensors[7], backend="numba")
        os._exit(0 if got.equal(expected) else 1)

    child = multiprocessing.get_context("fork").Process(target=scan_again)
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0


def convolve_naively(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool) -> Tensor:
    """The definition, one tap at a time."""
    taps, length = weight.shape[1], x.shape[1]
    outputs = []
    for t in range(length):
        y = bias.expand(x.shape[0], -1)
        for k in range(taps):
            neighbor = t + (taps - 1 - k) if reverse else t - (taps - 1 - k)
            if 0 <= neighbor < length:
                y = y + weight[:, k] * x[:, neighbor]
        outputs.append(y / (1 + torch.exp(-y)))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 70), (2, 33, 64)], ids=str)
def test_convolution_equals_the_naive_loop(
    backend: str, reverse: bool, shape: tuple[int, int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape[:2], 2 * shape[2], generator=generator)
    x = wide[..., shape[2] :]  # as it is taken out of the in-projection
    weight, bias = (
        torch.randn(shape[2], 4, generator=generator),
        torch.randn(shape[2], generator=generator),
    )
    g = torch.randn(shape, generator=generator)

    def run(
        function: Callable[..., Tensor], dtype: torch.dtype, **kwargs: str
    ) -> dict[str, Tensor]:
        leaves = {
            name: t.to(dtype).requires_grad_()
            for name, t in {"x": x.detach(), "weight": weight, "bias": bias}.items()
        }
        out = function(*leaves.values(), reverse=reverse, **kwargs)
        gradients = torch.autograd.grad(out, [*leaves.values()], g.to(dtype))
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    expected = run(convolve_naively, torch.float64)
    assert_all_close(run(causal_conv, torch.float32, backend=backend), expected, relative=3e-6)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_in_the_interpreter() -> None:
    """The tests above in a separate process: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton-cpu",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert " passed" in finished.stdout


def test_every_backend_of_the_parameters_is_implemented() -> None:
    assert {*get_args(ScanBackend), "onnx", "parallel"} == {*scan._IMPLEMENTATIONS, "auto"}


def test_unknown_backends_are_refused_by_name() -> None:
    with pytest.raises(
        AlmrrError, match="'mambo'; take one of auto, mamba_ssm, triton, numba, torch"
    ):
        resolve_backend("mambo", "cpu")


@pytest.mark.parametrize(("name", "device"), [("numba", "cuda"), ("numba", "mps")])
def test_a_backend_is_refused_on_a_device_it_does_not_run_on(name: str, device: str) -> None:
    with pytest.raises(AlmrrError, match=f"numba does not run on {device}"):
        resolve_backend(name, device)


@pytest.mark.skipif(not scan._why_absent("mamba_ssm"), reason="mamba-ssm is installed here")
def test_absent_mamba_ssm_says_how_to_get_it() -> None:
    with pytest.raises(AlmrrError, match=r"MAMBA_KEEP_CUDA_BUILD=TRUE.*--no-build-isolation"):
        resolve_backend("mamba_ssm", "cuda")


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let availability be looked up anew, before and after."""
    caches = (scan._why_absent, scan._choose)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_numba_auto_takes_torch_and_a_named_numba_is_an_error(
    forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("numba_backend", "numba_kernels"):
        monkeypatch.delitem(sys.modules, f"{scan.__name__}.{module}", raising=False)
        monkeypatch.delattr(scan, module, raising=False)
    for module in ("bits", "cpu_kernels"):  # these import numba, wherever it is present
        monkeypatch.delitem(sys.modules, f"almrr_pipeline.model.kernels.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert resolve_backend("auto", "cpu") == "torch"
    case = draw_case((1, 3, 2, 2))
    assert_all_close(
        case.run(selective_scan), case.run(selective_scan, backend="torch"), relative=0
    )
    with pytest.raises(AlmrrError, match=r"numba cannot be used here.*pip install numba"):
        case.run(selective_scan, backend="numba")


def test_auto_says_once_what_it_took(forgetful: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=scan.__name__):
        chosen = {resolve_backend("auto", "cpu") for _ in range(3)}
    assert chosen == {"numba"}
    assert [record.getMessage() for record in caplog.records] == [
        "Selective scan on cpu: backend numba (inference.scan_backend sets another)."
    ]


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from almrr_pipeline.model.kernels import cpu_kernels

    def refuse_cache(*, cache: bool = False, **options: object) -> Callable[..., object]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(cpu_kernels, "njit", refuse_cache)
    compiled, options = cpu_kernels.compile_kernel(len)
    assert compiled is len
    assert options["nogil"]


def test_mamba_ssm_without_its_compiled_kernel_is_absent(
    forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built without MAMBA_KEEP_CUDA_BUILD it imports, and only its first scan fails."""
    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = None
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, f"{scan.__name__}.mamba_ssm_backend", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(AlmrrError, match=r"No module named 'selective_scan_cuda'.*nvcc"):
        resolve_backend("mamba_ssm", "cuda")


@pytest.mark.parametrize("missing", ["compiler", "CC", "header"])
def test_triton_without_what_compiles_is_absent(
    missing: str, forgetful: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    if missing == "header":
        monkeypatch.setattr(scan.shutil, "which", lambda name: name)
        monkeypatch.setattr(scan.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        expected = "no Python.h in"
    elif missing == "CC":
        monkeypatch.setenv("CC", "no-such-compiler")
        expected = r"no C compiler \(no-such-compiler\)"
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        expected = r"no C compiler \(gcc or clang\)"
    assert resolve_backend("auto", "cuda") == "parallel"
    with pytest.raises(AlmrrError, match=f"triton cannot be used here: .*{expected}.*python3-dev"):
        resolve_backend("triton", "cuda")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_devices_without_kernels_take_the_form_of_few_operations(
    device: str, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_backend("auto", device) == "parallel"


@pytest.mark.parametrize("backend", ["numba", "torch", "parallel"])
def test_torch_compile_sees_one_graph(backend: str) -> None:
    case = draw_case((2, 20, 6, 4), reverse=True)
    expected = case.run(selective_scan, backend=backend)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    assert_all_close(
        case.run(compiled, backend=backend),
        expected,
        relative=0 if backend == "numba" else 1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_cuda_tensors_pass_through_triton_s_operator(
    dtype: torch.dtype, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes, dtypes and devices of the output and all gradients; no kernel runs.

    Autograd does not run on fake CUDA tensors where there is no driver: its operator is called.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr(scan, "_why_absent", lambda name: "")
    case = draw_case((2, 20, 6, 4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        operands = [case.tensors[name].to("cuda", dtype) for name in NAMES]
        out = selective_scan(*operands[:6], z=operands[6], delta_bias=operands[7])
        _, starts = fused._scan(*operands, True, False, True, "triton")
        gradients = fused._scan_backward(out, starts, *operands, True, False, "triton")
    assert resolve_backend("auto", "cuda") == "triton"
    for value, like in zip((out, *gradients), (operands[0], *operands), strict=True):
        assert (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device)


@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_keeps_torch_s_contracts(gated: bool) -> None:
    """Schema, fake kernels and registration of gradients, by torch's own checks."""
    case = draw_case((1, 5, 3, 2))
    tensors = [case.tensors[name].requires_grad_() for name in NAMES]
    optional = tensors[6:] if gated else [None, None]
    given = (*tensors[:6], *optional, True, False, True, "numba")
    torch.library.opcheck(fused._scan, given)


@pytest.mark.parametrize("reverse", [False, True])
def test_mamba_ssm_is_handed_its_own_layout(
    reverse: bool, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with signature, layout and dtypes of mamba-ssm's selective_scan_fn."""

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None = None, z: Tensor | None = None, delta_bias: Tensor | None = None,
        delta_softplus: bool = False, return_last_state: bool = False,
    ) -> Tensor:  # fmt: skip
        assert {u.dtype, delta.dtype, B.dtype, C.dtype, z.dtype} == {torch.bfloat16}
        assert {A.dtype, D.dtype, delta_bias.dtype} == {torch.float32}
        assert not return_last_state
        rows = [
            tensor.transpose(1, 2).double() for tensor in (u, delta, B, C, z)
        ]  # from (b, d, l) and (b, n, l)
        out = scan_naively(
            rows[0], rows[1], A.double(), rows[2], rows[3], D.double(),
            z=rows[4], delta_bias=delta_bias.double(), delta_softplus=delta_softplus,
        )  # fmt: skip
        return out.transpose(1, 2).to(u.dtype)

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    monkeypatch.delitem(sys.modules, f"{scan.__name__}.mamba_ssm_backend", raising=False)
    case = draw_case((2, 9, 5, 3), delta_softplus=True, reverse=reverse).to(torch.bfloat16)
    case.tensors |= {name: case.tensors[name].float() for name in ("A", "D", "delta_bias")}
    backend = importlib.import_module(f"{scan.__name__}.mamba_ssm_backend")
    got = case.run(
        lambda *given, **optional: backend.scan_with_mamba_ssm(ScanOperands(*given, **optional))
    )
    assert_all_close(got, case.to(torch.float64).run(scan_naively), relative=2**-8)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("delta", (2, 9, 4)), ("A", (4, 3)), ("B", (2, 9, 4)), ("D", (4,)), ("z", (2, 8, 5))],
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...]) -> None:
    case = draw_case((2, 9, 5, 3))
    case.tensors[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"^(A|B|{name}) must have shape"):
        case.run(selective_scan)


@pytest.mark.skipif(INTERPRETED, reason="numba's kernels are tested without the interpreter")
def test_a_kernel_from_the_cache_rounds_as_one_compiled_in_this_process(tmp_path: Path) -> None:
    """Else a training in a fresh installation could not be repeated to the bit."""
    program = """
import hashlib, torch
from almrr_pipeline.model.kernels.scan import selective_scan
g = torch.Generator().manual_seed(1)
tokens, states = (2, 40, 32), (2, 40, 16)
shapes = [tokens, tokens, (32, 16), states, states, (32,), tokens, (32,)]
u, delta, a, b, c, d, z, bias = (torch.randn(shape, generator=g) for shape in shapes)
given = [x.requires_grad_() for x in (u, delta, -a.exp(), b, c, d, z, bias)]
out = selective_scan(*given[:6], z=given[6], delta_bias=given[7], backend="numba")
found = [out, *torch.autograd.grad(out.square().sum(), given)]
bits = b"".join(x.detach().contiguous().numpy().tobytes() for x in found)
print(hashlib.sha256(bits).hexdigest())
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert list(tmp_path.rglob("*.nbc"))
    assert runs[0] == runs[1]
