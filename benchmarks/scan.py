"""Scan backends against the indexed Python loop, on the CPU and, if there is one, on the GPU.

python benchmarks/scan.py --shape 4 256 384 16 --repeats 9
python benchmarks/scan.py --device cuda --sweep --seconds 60 --json sweep.json

Prints a Markdown table: medians and quartiles in milliseconds, peak memory of forward and
backward, and how many times faster than the loop each backend is. The loop is the formulation that
the authors' dependencies fall back to (mamba-ssm's `selective_scan_ref`): all decays at once, then
`decay[:, t]` step by step, gradients by autograd.

`--sweep` compares constants of the Triton backend instead, at batches of 4, 8 and 32 in float32 and
bfloat16, until the time is up: medians of the kernels' time, as a CUDA graph, so that the host's
launches do not count, and of a call with them. On a CPU it runs in Triton's interpreter
(TRITON_INTERPRET=1), for a small --shape alone.
"""

# ruff: noqa: N803, N806, E741 - names are those of the formulas; a benchmark prints
from __future__ import annotations

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from timing import Timing, measure, measure_peak_memory
from torch import Tensor

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.model.kernels.scan import BACKENDS, resolve_backend, selective_scan

LOOP = "indexed loop"
_LOOP_REPEATS = 3
SWEEP: tuple[dict[str, int], ...] = (
    {},
    {"_PROGRAMS": 1},  # the tokens are not split
    {"_PROGRAMS": 384},
    {"_PROGRAMS": 768},
    {"_PROGRAMS": 3072},
    {"_BLOCK_D": 16, "_WARPS": 2, "_CELLS": 2048},
    {"_BLOCK_D": 16},
    {"_BLOCK_D": 32, "_WARPS": 4, "_CELLS": 4096},
    {"_BLOCK_D": 32, "_WARPS": 4, "_CELLS": 2048},
    {"_CELLS": 512},
    {"_WARPS": 2},
    {"_STAGES": 2},
    {"_STAGES": 3},
)
"""Constants of `triton_backend` that differ from what stands there."""


@dataclass(frozen=True)
class Inputs:
    """Leaves of a scan, and the gradient of its output."""

    required: tuple[Tensor, ...]
    z: Tensor
    delta_bias: Tensor
    gradient: Tensor

    def leaves(self) -> tuple[Tensor, ...]:
        """All that gets a gradient."""
        return (*self.required, self.z, self.delta_bias)


def scan_by_indexing(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """The indexed loop; shapes as in `almrr_pipeline.model.kernels.scan.selective_scan`."""
    delta = F.softplus(delta + delta_bias)
    decay = torch.exp(delta.unsqueeze(-1) * A)  # (b, l, d, n)
    increments = (delta * u).unsqueeze(-1) * B.unsqueeze(2)  # (b, l, d, n)
    h, outputs = torch.zeros_like(decay[:, 0]), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + increments[:, t]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return (torch.stack(outputs, 1) + D * u) * F.silu(z)


def draw_inputs(shape: Sequence[int], device: str, dtype: torch.dtype) -> Inputs:
    """Tensors as a network has them: step sizes around 0.01, A = -(1..n)."""
    (b, l, d, n), generator = shape, torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

    A = -torch.arange(1.0, n + 1, device=device).repeat(d, 1)
    bias = torch.full((d,), -4.6, device=device)
    required = (
        draw(b, l, d),
        draw(b, l, d),
        A.requires_grad_(),
        draw(b, l, n),
        draw(b, l, n),
        draw(d),
    )
    return Inputs(required, draw(b, l, d), bias.requires_grad_(), draw(b, l, d).detach())


def run_forward(scan: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """One call, as in inference."""
    with torch.no_grad():
        return scan(*inputs.required, z=inputs.z, delta_bias=inputs.delta_bias)


def run_both_ways(scan: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """One call and the gradients of everything that goes in, as in training."""
    out = scan(*inputs.required, z=inputs.z, delta_bias=inputs.delta_bias)
    return torch.autograd.grad(out, inputs.leaves(), inputs.gradient)


def list_scans(device: str) -> dict[str, Callable[..., Tensor]]:
    """The loop, and every backend that runs on the device."""
    scans: dict[str, Callable[..., Tensor]] = {LOOP: scan_by_indexing}
    for name in (*BACKENDS, "parallel"):
        try:
            scans[name] = partial(selective_scan, backend=resolve_backend(name, device))
        except AlmrrError:
            continue
    return scans


def format_row(
    name: str, times: tuple[Timing, Timing], memory: int | None, loop: tuple[Timing, Timing]
) -> str:
    """One line of the table."""
    ratios = [
        f"{theirs.median / mine.median:.1f}" for mine, theirs in zip(times, loop, strict=True)
    ]
    peak = "-" if memory is None else f"{memory / 2**20:.0f}"
    return f"| {name} | {times[0]} | {ratios[0]} | {times[1]} | {ratios[1]} | {peak} |"


def compare_on(device: str, shape: Sequence[int], dtype: torch.dtype, repeats: int) -> None:
    """Print the table of one device."""
    inputs = draw_inputs(shape, device, dtype)
    print(
        f"\n{device}: (b, l, d, n) = {tuple(shape)}, {dtype}, {torch.get_num_threads()} threads\n"
    )
    print(
        "| backend | forward | x | forward + backward | x | peak MiB |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    loop: tuple[Timing, Timing] | None = None
    for name, scan in list_scans(device).items():
        count = min(repeats, _LOOP_REPEATS) if name == LOOP else repeats
        forward, both = partial(run_forward, scan, inputs), partial(run_both_ways, scan, inputs)
        times = (
            measure(forward, repeats=count, device=device),
            measure(both, repeats=count, device=device),
        )
        loop = loop or times
        print(format_row(name, times, measure_peak_memory(both, device=device), loop), flush=True)


def sweep(
    device: str, shapes: Sequence[Sequence[int]], *, repeats: int, seconds: float
) -> list[dict[str, object]]:
    """Rows of `SWEEP`, printed as they come; float32 for all constants before bfloat16."""
    deadline = time.monotonic() + seconds
    print(
        "| constants | dtype | batch | forward, us | both, us | called: forward | both | differs |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [draw_inputs(shape, device, dtype) for shape in shapes]
        expected = [run_both_ways(_scan_with_triton, given) for given in inputs]
        for constants in SWEEP:
            for given, gradients in zip(inputs, expected, strict=True):
                if time.monotonic() > deadline:
                    print(f"The {seconds:.0f} seconds are up.")
                    return rows
                row: dict[str, object] = {
                    "constants": constants,
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": len(given.z),
                    **_measure_constants(constants, given, gradients, repeats),
                }
                rows.append(row)
                names = " ".join(f"{name[1:]}={value}" for name, value in constants.items())
                values = [
                    "-" if value is None else f"{value:.3g}" if isinstance(value, float) else value
                    for value in row.values()
                ]
                print(f"| {names or 'as they are'} | " + " | ".join(map(str, values[1:])) + " |")
    return rows


def _scan_with_triton(*tensors: Tensor, **options: Tensor) -> Tensor:
    return selective_scan(*tensors, **options, backend="triton")


def _measure_constants(
    constants: dict[str, int], inputs: Inputs, expected: tuple[Tensor, ...], repeats: int
) -> dict[str, float | str | None]:
    """Microseconds, and the largest relative difference of a gradient from `expected`."""
    from almrr_pipeline.model.kernels.scan import triton_backend

    device = inputs.z.device.type
    try:
        with contextlib.ExitStack() as stack:
            for name, value in constants.items():
                stack.enter_context(mock.patch.object(triton_backend, name, value))
            forward = partial(run_forward, _scan_with_triton, inputs)
            both = partial(run_both_ways, _scan_with_triton, inputs)
            pairs = zip(both(), expected, strict=True)
            differs = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            graphs = [_time_graph(call) if device == "cuda" else None for call in (forward, both)]
            called = [
                measure(call, repeats=repeats, device=device).median * 1e6
                for call in (forward, both)
            ]
    except Exception as error:  # what a GPU cannot hold must not end the sweep
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    names = ("forward, us", "both, us", "called forward, us", "called both, us", "differs")
    return dict(zip(names, (*graphs, *called, differs), strict=True))


def _time_graph(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=10, return_mode="median")) * 1e3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", nargs=4, type=int, default=(4, 256, 384, 16), metavar=("B", "L", "D", "N")
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="this one alone; otherwise all there are"
    )
    parser.add_argument("--sweep", action="store_true", help="constants of the Triton backend")
    parser.add_argument("--seconds", type=float, default=60, help="of the sweep, at most")
    parser.add_argument("--json", type=Path, help="write the sweep's rows there")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    if arguments.sweep:
        device = arguments.device or "cuda"
        resolve_backend("triton", device)  # or say what is missing
        _, *widths = arguments.shape
        batches = (4, 8, 32) if device == "cuda" else arguments.shape[:1]
        shapes = [(batch, *widths) for batch in batches]
        rows = sweep(device, shapes, repeats=arguments.repeats, seconds=arguments.seconds)
        if arguments.json:
            name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
            result = {"device": name, "torch": torch.__version__, "rows": rows}
            arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
        return
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in [arguments.device] if arguments.device else present:
        compare_on(device, arguments.shape, getattr(torch, arguments.dtype), arguments.repeats)


if __name__ == "__main__":
    main()
