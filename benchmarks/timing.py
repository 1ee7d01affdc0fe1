"""What every benchmark here measures with: medians with their spread, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the first and third quartile of all calls."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Milliseconds, as the tables print them: `12.3 (12.1-12.9) ms`."""
        return f"{self.median * 1e3:.4g} ({self.low * 1e3:.4g}-{self.high * 1e3:.4g}) ms"


def measure(
    fn: Callable[[], object], *, repeats: int, warmup: int = 1, device: torch.device | str = "cpu"
) -> Timing:
    """Time `fn`, one call at a time, after `warmup` calls that do not count.

    On CUDA the clock is read only after the device has finished. `repeats` must be at least 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    for _ in range(warmup):
        fn()
    seconds = sorted(_time_once(fn, torch.device(device)) for _ in range(repeats))
    low, _, high = (
        statistics.quantiles(seconds, n=4, method="inclusive") if repeats > 1 else seconds * 3
    )
    return Timing(statistics.median(seconds), low, high)


def read_clocks(fn: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds of a call, and CPU seconds of all threads meanwhile."""
    wall, cpu = time.perf_counter(), time.process_time()
    fn()
    return time.perf_counter() - wall, time.process_time() - cpu


def tabulate_clocks(
    times: Mapping[str, Sequence[tuple[float, float]]], *, unit: str, over: str, units: int = 1
) -> str:
    """A row per way: median milliseconds a unit by both clocks, each over the first way's.

    Args:
        times: of each way the calls' `read_clocks`.
        unit: what a time is of, as the table's head says it: "an image".
        over: what the head calls the first way.
        units: how many a call works on.
    """
    medians = {
        name: [1e3 * statistics.median(clock) / units for clock in zip(*calls, strict=True)]
        for name, calls in times.items()
    }
    first = next(iter(medians.values()))
    lines = [f"| way | ms {unit} | over {over} | CPU ms {unit} | over {over} |", "| --- " * 5 + "|"]
    for name, clocks in medians.items():
        pairs = zip(clocks, first, strict=True)
        cells = [f"{own:.1f} | {own / reference:.2f}" for own, reference in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_peak_memory(
    fn: Callable[[], object], *, device: torch.device | str = "cpu"
) -> int | None:
    """Bytes by which one call of `fn` raises the memory in use at its highest point.

    CUDA: memory held by torch's allocator. CPU: resident memory, as Linux counts it; None on other
        systems.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    if not _reset_resident_peak():
        return None
    before = _resident_bytes("VmRSS")
    fn()
    return max(0, _resident_bytes("VmHWM") - before)


def _time_once(fn: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _return_free_memory() -> None:
    """Return freed memory to the system, so that the next call's growth is visible."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset_resident_peak() -> bool:
    """Ask Linux to forget the highest resident size so far (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024
