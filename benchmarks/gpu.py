r"""Everything that is to be known of a GPU, with one command and within a budget of time.

    python benchmarks/gpu.py --data FOLDER --output FOLDER [--budget 540]
        [--only SECTION,SECTION] [--limit SECTION=SECONDS] [--minutes DATASET=MINUTES]
        [--set DATASET:name=value] [--commit NAME] [--device cpu --tiny]

Sections, in this order; each in a process of its own, which is killed when its time is over, so
that a failing kernel or a hanging one costs the others nothing:

    environment  device, versions, and the measured ceilings: copy bandwidth, rates of products
    tests        the tests marked gpu
    scan         every backend of the selective scan, forward, and forward and backward
    step         training steps at the paper's widths, ours and the authors' formulation
    inference    anomaly maps: fused, unfused, the authors' formulation, the bare backbone
    train        real trainings from images in folders, and their metrics (gpu_training.py)
    graph        training steps captured as a CUDA graph, against the same steps issued one by one,
                 and deterministic algorithms against others, by turns; only if named by --only
    compile      training steps under torch.compile; only if named by --only

The machine needs torch, timm, lightning, triton and this package's other libraries, but not Kedro,
DVC or MLflow. FOLDER of --data has mt_defect/MT_*/Imgs, nanotwice/{Normal,Anomalous}, and
dtd/images/CLASS as published, and weights/*.pth of a ResNet-50 of Caffe's kind; sections before
`train` need none of it. The output folder gets results.json, results.md (the tables), log.txt, and
for each dataset NAME.zip (overlays, scores, history, metrics) and NAME_maps.npz. results.json and
results.md are written again after every section.

On CUDA a time is that between two events, so that a call is measured as it is in a loop that never
waits for the device; `graph` is the device's time alone, replayed as a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
LIMITS = {"environment": 40, "tests": 100, "scan": 75, "step": 150, "inference": 75, "train": 600}
"""Seconds of a section, the start of its process included; the budget can leave it less."""
NAMED = {"graph": 60, "compile": 180}
"""Seconds of the sections that only --only starts."""
AUTHORS_MOST = 31
"""Images in a batch of the authors', at most: their 1024 channels at 256 x 256 are 2^31 values at
32, one more than the 32-bit indices of torch's kernels reach."""
GRACE = 8.0
"""Seconds between the end of a section's time, at which it stops itself, and its being killed."""
LEAST = 5.0
"""Seconds below which a section is not begun."""
PACKAGES = ("torch", "triton", "timm", "lightning", "numpy", "numba", "mamba-ssm")
Row = dict[str, Any]


@dataclass
class Record:
    """What a section has found, written to its file after every addition."""

    path: Path
    deadline: float  # by time.monotonic
    values: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the section has to be done."""
        return self.deadline - time.monotonic()

    def put(self, **values: Any) -> None:  # noqa: ANN401 (anything that JSON holds)
        """Keep single values."""
        self.values.update(values)
        self._write(values)

    def row(self, table: str, **values: Any) -> None:  # noqa: ANN401
        """Add a row to a table."""
        self.tables.setdefault(table, []).append(values)
        self._write({table: values})

    def require(self, seconds: float) -> None:
        """Raise a TimeoutError, which `attempt` keeps as a short note, if there is less left."""
        if self.left() < seconds:
            raise TimeoutError(f"skipped: {seconds:.0f} s are needed, {self.left():.0f} s are left")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Go on after an error, which is kept together with what was attempted."""
        try:
            yield
        except Exception as error:
            short = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.errors.append(short)
            if not isinstance(error, TimeoutError):
                traceback.print_exc()
            self._write({"error": short})

    def _write(self, shown: dict[str, Any]) -> None:
        print(f"  {time.strftime('%H:%M:%S')} {json.dumps(shown, default=str)[:400]}", flush=True)
        content = {"values": self.values, "tables": self.tables, "errors": self.errors}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, default=str), encoding="utf-8")
        part.replace(self.path)


# ---------------------------------------------------------------------------------------------
# The driver: it imports nothing that touches the device.


def main() -> None:
    """Run the sections, or one of them where this is its process."""
    arguments = parse()
    if arguments.section:
        run_section(arguments)
        return
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    chosen = arguments.only.split(",") if arguments.only else list(LIMITS)
    limits = {**LIMITS, **NAMED, **read_pairs(arguments.limit)}
    end = time.monotonic() + arguments.budget
    results: dict[str, Any] = {"command": sys.argv[1:], "commit": arguments.commit or read_commit()}
    results["sections"] = {}
    with tempfile.TemporaryDirectory() as scratch, (output / "log.txt").open("a") as log:
        for name in chosen:
            seconds = min(limits[name], end - time.monotonic() - GRACE)
            say(log, f"== {name}: at most {seconds:.0f} s")
            results["sections"][name] = start_section(name, seconds, Path(scratch), log)
            write_results(output, results)
    print((output / "results.md").read_text(encoding="utf-8"))
    for name, one in results["sections"].items():
        print(f"{name}: {one['status']}, {one['seconds']} s, {len(one['errors'])} errors")


def parse(command: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--data", type=Path, help="folder with the datasets; for `train`")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", help=f"of {','.join([*LIMITS, *NAMED])}")
    parser.add_argument("--limit", action="append", default=[], help="SECTION=SECONDS")
    parser.add_argument("--datasets", default="mt_defect,nanotwice", help="that `train` trains on")
    parser.add_argument("--minutes", action="append", default=[], help="DATASET=MINUTES, of `fit`")
    parser.add_argument("--set", action="append", default=[], help="DATASET:name=value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="where git cannot tell")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small and once, to try the script")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(command)
    known = {*LIMITS, *NAMED}
    names = set(arguments.only.split(",") if arguments.only else ()) | set(
        read_pairs(arguments.limit)
    )
    if names - known:
        parser.error(f"there is no section {min(names - known)}; take some of {sorted(known)}")
    return arguments


def read_pairs(given: Sequence[str]) -> dict[str, float]:
    """Split NAME=NUMBER."""
    return {name: float(value) for name, _, value in (one.partition("=") for one in given)}


def start_section(name: str, seconds: float, scratch: Path, log: Any) -> dict[str, Any]:  # noqa: ANN401
    """Run a section in a process of its own; returns what it found, also if it was killed."""
    if seconds < LEAST:
        return {"status": "skipped", "seconds": 0, "errors": ["the budget was used up"]}
    begun = time.monotonic()
    command = [sys.executable, __file__, *sys.argv[1:], "--section", name]
    command += ["--seconds", str(seconds), "--scratch", str(scratch)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, 9)  # with the processes that it has started

    watch = threading.Timer(seconds + GRACE, kill)
    watch.start()
    assert process.stdout is not None
    for line in process.stdout:
        say(log, line.rstrip())
    status = process.wait()
    watch.cancel()
    path = scratch / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"errors": []}
    found["seconds"] = round(time.monotonic() - begun, 1)
    found["status"] = "killed" if killed.is_set() else f"exit {status}" if status else "done"
    return found


def say(log: Any, line: str) -> None:  # noqa: ANN401 (a text file)
    """Print a line, and keep it."""
    print(line, flush=True)
    log.write(line + "\n")
    log.flush()


def read_commit() -> str:
    """The commit, as git knows it."""
    from run import read_commit as ask_git

    return ask_git()


def write_results(output: Path, results: dict[str, Any]) -> None:
    """Write results.json, and results.md from it."""
    for name, text in (
        ("results.json", json.dumps(results, indent=1)),
        ("results.md", to_markdown(results)),
    ):
        part = output / f"{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(output / name)


def to_markdown(results: dict[str, Any]) -> str:
    """The tables of all sections, as the documentation takes them."""
    lines = [
        f"Commit {results['commit']}, `python benchmarks/gpu.py {' '.join(results['command'])}`"
    ]
    for name, section in results["sections"].items():
        lines += ["", f"## {name} ({section['status']}, {section['seconds']} s)"]
        values = {k: v for k, v in section.get("values", {}).items() if not isinstance(v, dict)}
        lines += ["", *(f"- {key}: {show(value)}" for key, value in values.items())]
        for title, rows in section.get("tables", {}).items():
            if title == "outcomes":  # of the tests: those that say something
                rows = [row for row in rows if row["outcome"] != "PASSED"]
            heads = list(dict.fromkeys(key for row in rows for key in row))
            lines += [
                "",
                f"### {title}",
                "",
                f"| {' | '.join(heads)} |",
                f"|{' --- |' * len(heads)}",
            ]
            lines += [f"| {' | '.join(show(row.get(key)) for key in heads)} |" for row in rows]
        lines += ["", *(f"- failed: {error.splitlines()[-1]}" for error in section["errors"])]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def show(value: object) -> str:
    """A cell: four figures of a number, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


# ---------------------------------------------------------------------------------------------
# A section's process.


def run_section(arguments: argparse.Namespace) -> None:
    """Run one section; whatever it raises is kept with what it has found before."""
    path = arguments.scratch / f"{arguments.section}.json"
    record = Record(path, time.monotonic() + arguments.seconds)
    sections: dict[str, Callable[[argparse.Namespace, Record], None]] = {
        "environment": measure_environment,
        "tests": run_tests,
        "scan": measure_scan,
        "step": measure_steps,
        "inference": measure_inference,
        "train": train,
        "graph": measure_graphs,
        "compile": measure_compiled,
    }
    try:
        sections[arguments.section](arguments, record)
    except SystemExit as end:
        record.errors.append(str(end))
        record.put()
        raise
    except BaseException:
        record.errors.append(traceback.format_exc(limit=-8).strip())
        record.put()
        raise


def measure_environment(arguments: argparse.Namespace, record: Record) -> None:
    """Device, versions, and the ceilings that times are compared with."""
    import torch
    from run import read_processor, read_version

    record.put(python=platform.python_version(), processor=read_processor(), cores=os.cpu_count())
    record.put(scratch_gb_free=shutil.disk_usage(tempfile.gettempdir()).free / 1e9)
    record.put(**{name: read_version(name) for name in PACKAGES})
    device = torch.device(arguments.device)
    if device.type == "cuda":
        with record.attempt("properties"):
            record.put(device=torch.cuda.get_device_name(device), cuda=torch.version.cuda)
            found = torch.cuda.get_device_properties(device)
            record.put(
                multiprocessors=found.multi_processor_count,
                memory_gib=round(found.total_memory / 2**30, 1),
                l2_mib=getattr(found, "L2_cache_size", 0) / 2**20,
                cudnn=torch.backends.cudnn.version(),
                precision_of_convolutions=torch.backends.cudnn.conv.fp32_precision,
                precision_of_products=torch.backends.cuda.matmul.fp32_precision,
            )
    with record.attempt("nvidia-smi"):
        record.put(nvidia_smi=ask_nvidia_smi() if device.type == "cuda" else "")
    count = 2**20 if arguments.tiny else 2**29  # floats: 2 GiB, far beyond the cache
    with record.attempt("copy"):
        source = torch.rand(count, device=device)
        target = torch.empty_like(source)
        took = time_calls(partial(target.copy_, source), device, most=30)
        record.row("ceilings", what="copy, read and written", per_second=8 * count / took.median,
                   unit="B/s")  # fmt: skip
        del source, target
    side = 256 if arguments.tiny else 8192
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "ieee"),
        ("float32, TF32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    ):
        with record.attempt(f"product in {name}"), float32_by(precision):
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            took = time_calls(partial(torch.mm, a, b), device, most=20)
            rate = 2 * side**3 / took.median
            record.row("ceilings", what=f"product of {side}^2 in {name}", per_second=rate,
                       unit="FLOP/s")  # fmt: skip
    with record.attempt("nvidia-smi"):
        record.put(nvidia_smi_after=ask_nvidia_smi() if device.type == "cuda" else "")


def ask_nvidia_smi() -> str:
    """Driver, clocks, power and memory, read only."""
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout or done.stderr).strip()


def run_tests(arguments: argparse.Namespace, record: Record) -> None:
    """The tests marked gpu: of each file that has some, outcomes by name."""
    root = HERE.parent
    files = [
        str(path.relative_to(root))
        for path in sorted((root / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8") and "benchmarks" not in path.parts
    ]
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-m", "gpu", *files]
    if find_spec("pytest_timeout") is not None:  # a test that hangs fails by name
        command += ["--timeout", "40", "--timeout-method", "signal"]
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    counts: dict[str, int] = {}
    assert process.stdout is not None
    for line in process.stdout:
        print(line.rstrip(), flush=True)
        found = re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", line)
        if found:
            counts[found[2]] = counts.get(found[2], 0) + 1
            record.row("outcomes", test=found[1], outcome=found[2])
        elif line.startswith(("FAILED ", "ERROR ")):
            record.errors.append(line.strip())
    record.put(exit_status=process.wait(), **counts)


def measure_scan(arguments: argparse.Namespace, record: Record) -> None:
    """Every backend of the scan; then the Triton backend with each of its constants changed."""
    import scan
    import torch

    device = torch.device(arguments.device)
    shapes = [(1, 64, 32, 16)] if arguments.tiny else [(b, 256, 384, 16) for b in (4, 8, 32)]
    ways = scan.list_scans(arguments.device)
    ways = {
        name: ways[name] for name in sorted(ways, key=("triton", "mamba_ssm").__contains__)[::-1]
    }
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            inputs = scan.draw_inputs(shape, str(device), dtype)
            for name, way in ways.items():
                slow = name in (scan.LOOP, "torch", "parallel")
                if slow and (dtype, shape) != (torch.float32, shapes[0]):
                    continue
                with record.attempt(f"{name} {shape} {dtype}"):
                    record.require(5)
                    record.row("scan", backend=name, **time_scan(way, inputs, slow=slow))
            compare_with_mamba_ssm(record, inputs)
    if device.type == "cuda":
        sweep_constants(record)


def compare_with_mamba_ssm(record: Record, inputs: Any) -> None:  # noqa: ANN401 (scan.Inputs)
    """How many times mamba-ssm's time ours takes: by its adapter here, and in its own layout."""
    rows = {row["backend"]: row for row in record.tables.get("scan", [])[-8:]
            if row["batch"] == len(inputs.z)
            and row["dtype"] == str(inputs.z.dtype).removeprefix("torch.")}  # fmt: skip
    if not {"triton", "mamba_ssm"} <= rows.keys():
        return
    with record.attempt("mamba_ssm in its own layout"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def turn(tensor: Any) -> Any:  # noqa: ANN401
            return tensor.detach().transpose(1, 2).contiguous().requires_grad_()

        u, delta, a, b, c, d = inputs.required
        floats = [one.detach().float().requires_grad_() for one in (a, d, inputs.delta_bias)]
        required = (turn(u), turn(delta), floats[0], turn(b), turn(c), floats[1])
        own = type(inputs)(required, turn(inputs.z), floats[2], turn(inputs.gradient).detach())
        way = partial(selective_scan_fn, delta_softplus=True)
        rows["mamba_ssm, its own layout"] = time_scan(way, own)
        row = {"batch": len(inputs.z), "dtype": rows["triton"]["dtype"]}
        record.row("scan", backend="mamba_ssm, its own layout",
                   **rows["mamba_ssm, its own layout"])  # fmt: skip
        row |= {
            f"{label}, over {name}": rows["triton"][key] / rows[name][key]
            for name in ("mamba_ssm", "mamba_ssm, its own layout")
            for label, key in (("forward", "forward, graph, us"), ("both", "both, graph, us"))
        }
        record.row("triton over mamba_ssm", **row)


def time_scan(way: Callable[..., Any], inputs: Any, *, slow: bool = False) -> Row:  # noqa: ANN401
    """Times of a scan in microseconds; no graph of slow ones, which launch thousands of kernels."""
    import scan

    u = inputs.required[0]
    row: Row = {"batch": len(u), "dtype": str(u.dtype).removeprefix("torch.")}
    for label, run in (("forward", scan.run_forward), ("both", scan.run_both_ways)):
        call = partial(run, way, inputs)
        row[f"{label}, us"] = time_calls(call, u.device, most=3 if slow else 50).median * 1e6
        row[f"{label}, graph, us"] = None if slow else time_graph(call, u.device)
    return row


def sweep_constants(record: Record) -> None:
    """Halve and double each constant of the Triton backend by itself, at batch 4 and 32."""
    import scan
    import torch

    from almrr_pipeline.model.kernels.scan import selective_scan, triton_backend

    way = partial(selective_scan, backend="triton")
    constants = {
        name: value
        for name, value in vars(triton_backend).items()
        if re.fullmatch(r"_[A-Z][A-Z_]+", name) and type(value) is int
    }
    record.put(triton_constants=str(constants))
    for batch in (4, 32):
        inputs = scan.draw_inputs((batch, 256, 384, 16), "cuda", torch.float32)
        expected = scan.run_both_ways(way, inputs)
        for name, value in constants.items():
            for changed in (value // 2, value * 2) if value > 1 else (2, 4):
                if record.left() < 10:
                    return
                with (
                    record.attempt(f"{name} {changed}"),
                    mock.patch.object(triton_backend, name, changed),
                ):
                    found = scan.run_both_ways(way, inputs)
                    worst = max(
                        float((a - b).norm() / b.norm())
                        for a, b in zip(found, expected, strict=True)
                    )
                    times = time_scan(way, inputs)
                    record.row(
                        "constants", changed=f"{name} = {changed}", difference=worst, **times
                    )


def measure_steps(arguments: argparse.Namespace, record: Record) -> None:
    """Training steps: ours by the package's own parts on one batch, the authors' beside them."""
    from almrr_pipeline.model.almrr import ALMRR

    backbone, settings, size = build_parts(arguments)
    model = ALMRR(backbone, settings, image_size=size)
    record.put(trained_parameters=sum(one.numel() for one in model.trainable_parameters()))
    batches = (2,) if arguments.tiny else (32, 8, 4)
    for batch in batches:
        for precision in ("bf16-mixed", "tf32", "32-true"):
            time_ours(arguments, record, model, batch, {"precision": precision})
            if arguments.tiny:
                break
    for batch in (min(batch, AUTHORS_MOST) for batch in reversed(batches)):
        for half in (False,) if arguments.tiny else (False, True):
            time_authors(arguments, record, batch, half=half)
    for changes in (
        {"precision": "bf16-mixed", "deterministic": False},
        {"precision": "bf16-mixed", "channels_last": False},
        {"precision": "tf32", "deterministic": False},
        {"precision": "tf32", "channels_last": True},
        {"precision": "32-true", "deterministic": False},
        {"precision": "32-true", "channels_last": True},
    ):
        for batch in () if arguments.tiny else (batches[0], batches[-1]):
            time_ours(arguments, record, model, batch, changes)


def measure_compiled(arguments: argparse.Namespace, record: Record) -> None:
    """Training steps under torch.compile."""
    import torch

    from almrr_pipeline.model.almrr import ALMRR

    backbone, settings, size = build_parts(arguments)
    model = ALMRR(backbone, settings, image_size=size)
    for batch in (2,) if arguments.tiny else (32, 4):
        for mode in ("default", "reduce-overhead"):
            torch._dynamo.reset()  # or the second batch size would be compiled as a dynamic one
            given = {"precision": "bf16-mixed", "compile": True}
            time_ours(arguments, record, model, batch, given, mode=mode)


def measure_graphs(arguments: argparse.Namespace, record: Record) -> None:
    """Training steps by turns: deterministic or not, and captured as a CUDA graph."""
    from almrr_pipeline.model.almrr import ALMRR

    backbone, settings, size = build_parts(arguments)
    model = ALMRR(backbone, settings, image_size=size)
    for batch in (2,) if arguments.tiny else (32, 4):
        label = f"by turns, batch {batch}"
        with record.attempt(label), training_step(arguments, model, batch, {}) as (step, _, _):
            record.require(8)
            compare_algorithms(record, step, arguments.device, batch)
        free_memory()
    for batch in (2,) if arguments.tiny else (32, 4):
        label = f"captured, batch {batch}"
        with record.attempt(label), training_step(arguments, model, batch, {}) as parts:
            record.require(8)
            compare_with_graph(record, model, parts, arguments.device, batch)
        free_memory()


def compare_algorithms(record: Record, step: Callable[[], object], device: str, batch: int) -> None:
    """Times of deterministic algorithms and of others in one process, five times by turns."""
    import torch

    from almrr_pipeline.training.runtime import algorithms

    took: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(5 if device == "cuda" else 1):
        for deterministic in (True, False):
            with algorithms(deterministic=deterministic):
                timing = time_calls(step, torch.device(device), most=12, seconds=0.6)
            took[deterministic].append(timing.median * 1e3)
    ratios = sorted(a / b for a, b in zip(took[True], took[False], strict=True))
    record.row("deterministic over not", batch=batch, deterministic_ms=min(took[True]),
               other_ms=min(took[False]), ratio=ratios[len(ratios) // 2],
               lowest=ratios[0], highest=ratios[-1])  # fmt: skip


def compare_with_graph(
    record: Record,
    model: Any,  # noqa: ANN401
    parts: Any,  # noqa: ANN401
    device: str,
    batch: int,
) -> None:
    """Times of a step and of the same step as a CUDA graph, and whether both give one model."""
    import torch

    step, optimizer, wait = parts
    for group in optimizer.param_groups:
        group["capturable"] = device == "cuda"  # the count of steps stays on the device
    eager = time_calls(step, torch.device(device), most=20, seconds=1.5).median
    if device != "cuda":
        record.row("captured step", batch=batch, eager_ms=eager * 1e3)
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    begun = time.monotonic()
    with torch.cuda.graph(graph, stream=side):
        step()
    first = time.monotonic() - begun
    captured = time_calls(graph.replay, torch.device(device), most=20, seconds=1.5).median
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [one for state in optimizer.optimizer.state.values() for one in state.values()]
    before = [one.detach().clone() for one in tensors]
    after = []
    for call in (graph.replay, step):
        with torch.no_grad():
            for one, value in zip(tensors, before, strict=True):
                one.copy_(value)
        for number in range(3):
            torch.manual_seed(number)
            call()
        wait()
        after.append([one.detach().clone() for one in model.trainable_parameters()])
    differs = max(float((a - b).abs().max()) for a, b in zip(*after, strict=True))
    record.row("captured step", batch=batch, eager_ms=eager * 1e3, captured_ms=captured * 1e3,
               ratio=eager / captured, capture_s=first, weights_differ_by=differs)  # fmt: skip


def time_ours(
    arguments: argparse.Namespace,
    record: Record,
    model: Any,  # noqa: ANN401
    batch: int,
    changes: Row,
    mode: str | None = None,
) -> None:
    """A row of our step; `mode`: of torch.compile."""
    import torch

    device = torch.device(arguments.device)
    label = f"ours, batch {batch}, {changes}"
    with record.attempt(label), training_step(arguments, model, batch, changes, mode) as parts:
        record.require(8)
        step, _, wait = parts
        begun = time.monotonic()
        step()
        wait()
        first = time.monotonic() - begun
        took = time_calls(step, device, most=30, seconds=2.5)
        shown = {"deterministic": True, "channels_last": "auto", "compile": False, **changes}
        record.row("training step", batch=batch, way="ours", **shown, mode=mode,
                   ms=took.median * 1e3, quartiles=f"{took.low * 1e3:.4g}-{took.high * 1e3:.4g}",
                   images_per_second=batch / took.median, peak_gb=peak_memory(step, device),
                   first_s=first)  # fmt: skip
        if changes == {"precision": "bf16-mixed"} and batch != 8:
            profile_step(step, device, record, title=f"kernels, {label}")
    free_memory()


@contextmanager
def training_step(
    arguments: argparse.Namespace,
    model: Any,  # noqa: ANN401
    batch: int,
    changes: Row,
    mode: str | None = None,
) -> Iterator[tuple[Callable[[], None], Any, Callable[[], None]]]:
    """What `fit` does in a step, but for the making of the batch; its optimizer; a wait for it."""
    import torch

    from almrr_pipeline.config import TrainSettings
    from almrr_pipeline.training.optim import build_optimizer, clip_gradient
    from almrr_pipeline.training.runtime import training_environment
    from almrr_pipeline.training.train import TrainingStep

    device = torch.device(arguments.device)
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    changes = {"precision": "bf16-mixed", **changes}
    settings = TrainSettings(batch_size=batch, accelerator=accelerator, devices=1, **changes)
    with training_environment(model, settings) as (fabric, _):
        optimizer = build_optimizer(model, settings)
        module = TrainingStep(model, settings)
        if mode is not None:
            module._forward = torch.compile(model.training_forward, mode=mode)
        forward, optimizer = fabric.setup(module, optimizer)
        given = draw_batch(batch, model.image_size, device)

        def step() -> None:
            losses = forward(given)
            optimizer.zero_grad()
            fabric.backward(losses[0])
            clip_gradient(fabric, model, optimizer, settings.gradient_clip)
            optimizer.step()

        yield step, optimizer, torch.cuda.synchronize if device.type == "cuda" else lambda: None


def profile_step(step: Callable[[], object], device: Any, record: Record, *, title: str) -> None:  # noqa: ANN401
    """The kernels that take most of a step, and all of them together."""
    from torch.profiler import ProfilerActivity, profile

    kind = "CUDA" if device.type == "cuda" else "CPU"
    time_of = "self_device_time_total" if kind == "CUDA" else "self_cpu_time_total"
    steps = 3
    with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        for _ in range(steps):
            step()
    rows = [one for one in profiler.key_averages() if one.device_type.name == kind]  # no launches
    kernels = sorted(rows, key=lambda one: -getattr(one, time_of))
    for name, chosen in (("all", kernels), *((one.key[:90], [one]) for one in kernels[:20])):
        calls, total = (sum(getattr(one, key) for one in chosen) for key in ("count", time_of))
        record.row(title, kernel=name, calls=calls / steps, ms=total / steps / 1e3)


def time_authors(arguments: argparse.Namespace, record: Record, batch: int, *, half: bool) -> None:
    """Rows of the authors' step, with mamba-ssm's reference scan and with ours in its place."""
    import model as model_benchmark
    import torch
    from baselines.authors import AuthorsALMRR

    device = torch.device(arguments.device)
    backbone, settings, size = build_parts(arguments)
    precision = "bf16-mixed" if half else "float32 by torch's defaults"  # TF32 in convolutions
    for name, scan in model_benchmark.SCANS:
        with record.attempt(f"{name}, batch {batch}, {precision}"):
            record.require(12)
            authors = AuthorsALMRR(backbone, settings, image_size=size, scan=scan)
            images = [torch.rand(batch, 3, *size, device=device) for _ in range(2)]
            mask = (torch.rand(batch, *size, device=device) > 0.9).float()
            step = model_benchmark.build_step(authors, *images, mask)
            with half_precision(device, enabled=half):
                took = time_calls(step, device, most=8, seconds=2.0)
                record.row("training step", batch=batch, way=name, precision=precision,
                           ms=took.median * 1e3,
                           quartiles=f"{took.low * 1e3:.4g}-{took.high * 1e3:.4g}",
                           images_per_second=batch / took.median,
                           peak_gb=peak_memory(step, device))  # fmt: skip
        authors = images = mask = step = None  # before the next one takes as much
        free_memory()


def measure_inference(arguments: argparse.Namespace, record: Record) -> None:
    """Anomaly maps by every way, at three precisions."""
    import model as model_benchmark
    import torch
    from baselines.authors import AuthorsALMRR

    from almrr_pipeline.inference.fuse import fuse
    from almrr_pipeline.model.almrr import ALMRR

    device = torch.device(arguments.device)
    backbone, settings, size = build_parts(arguments)
    ours = ALMRR(backbone, settings, image_size=size).eval()
    ways: dict[str, Callable[..., Any]] = {"ours, fused": fuse(ours).to(device)}
    record.put(fused=True)
    ways |= {"ours": ours.to(device), model_benchmark.BACKBONE: backbone}
    authors = AuthorsALMRR(backbone, settings, image_size=size).eval().to(device)
    ways |= {name: partial(run_authors, authors, scan) for name, scan in model_benchmark.SCANS}
    for batch in (1,) if arguments.tiny else (1, 8, 32):
        images = torch.rand(batch, 3, *size, device=device)
        for precision in ("float32", "float32, TF32", "bfloat16")[: 1 if arguments.tiny else 3]:
            for name, way in ways.items():
                label = f"{name}, batch {batch}, {precision}"
                mode = "tf32" if precision == "float32, TF32" else "ieee"
                half = half_precision(device, enabled=precision == "bfloat16")
                slow = name == model_benchmark.AUTHORS
                with record.attempt(label), torch.no_grad(), float32_by(mode), half:
                    record.require(4)
                    most = AUTHORS_MOST if name.startswith(model_benchmark.AUTHORS) else batch
                    call = partial(way, images[:most])
                    took = time_calls(call, device, most=3 if slow else 30, seconds=1.0)
                    record.row("inference", batch=min(batch, most), way=name, precision=precision,
                               ms=took.median * 1e3,
                               quartiles=f"{took.low * 1e3:.4g}-{took.high * 1e3:.4g}",
                               images_per_second=min(batch, most) / took.median,
                               peak_gb=peak_memory(call, device))  # fmt: skip
        free_memory()


def run_authors(authors: Any, scan: str, images: Any) -> Any:  # noqa: ANN401 (module and tensors)
    """The authors' formulation with one scan."""
    authors.scan = scan
    return authors(images)


def train(arguments: argparse.Namespace, record: Record) -> None:
    """Real trainings: see gpu_training.py."""
    if arguments.data is None or not any((arguments.data / "weights").glob("*.pth")):
        sys.exit(f"--data {arguments.data}: there is no weights/*.pth; name the folder that has it")
    import gpu_training

    gpu_training.train_all(arguments, record)


# ---------------------------------------------------------------------------------------------
# What the sections share.


def build_parts(arguments: argparse.Namespace) -> tuple[Any, Any, tuple[int, int]]:
    """Backbone with random weights, model settings and image size: the paper's, or tiny ones."""
    import torch

    from almrr_pipeline.config import BackboneSettings, ModelSettings
    from almrr_pipeline.model.backbone import build_backbone

    torch.manual_seed(0)
    if arguments.tiny:
        tiny = ModelSettings(
            latent=16, dim=16, depth=1, state=4, decoder=(8, 8), refinement_width=4
        )
        return build_backbone(BackboneSettings(name="test_resnet"), weights=None), tiny, (128, 128)
    return build_backbone(BackboneSettings(), weights=None), ModelSettings(), (256, 256)


def draw_batch(batch: int, size: tuple[int, int], device: Any) -> dict[str, Any]:  # noqa: ANN401
    """A batch as the loader gives it, of noise."""
    import torch

    shape = (batch, *size, 3)
    images = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        for name in ("normal", "augmented")
    }
    return {**images, "mask": (torch.rand(batch, *size, device=device) > 0.9).to(torch.uint8)}


def time_calls(
    call: Callable[[], object],
    device: Any,  # noqa: ANN401
    *,
    most: int,
    seconds: float = 1.0,
) -> Any:  # noqa: ANN401 (timing.Timing)
    """Median and quartiles of a call: at least three calls, up to `most`, within the seconds."""
    import torch
    from timing import Timing, measure

    if device.type != "cuda":
        return measure(call, repeats=1, warmup=0)
    for _ in range(2):  # memory is taken, kernels are compiled, algorithms are chosen
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = int(min(most, max(3, seconds / (time.perf_counter() - begun))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    took = [start.elapsed_time(stop) / 1e3 for start, stop in pairwise(events)]
    low, median, high = quantiles(took, n=4, method="inclusive")
    return Timing(median, low, high)


def time_graph(call: Callable[[], object], device: Any) -> float | None:  # noqa: ANN401
    """Microseconds of a call as a CUDA graph: the median, without the host's launches."""
    if device.type != "cuda":
        return None
    import torch
    from triton.testing import do_bench_cudagraph

    with torch.cuda.device(device):
        return float(do_bench_cudagraph(call, rep=10, return_mode="median")) * 1e3


def peak_memory(call: Callable[[], object], device: Any) -> float | None:  # noqa: ANN401
    """GB that torch's allocator holds at most during a call, weights included."""
    if device.type != "cuda":
        return None
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def free_memory() -> None:
    """Return what is no longer used, so that the next measurement starts alike."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def float32_by(precision: str) -> Iterator[None]:
    """Float32 products and convolutions by "ieee" or by "tf32"; restored afterwards."""
    import torch

    owners = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = precision
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


def half_precision(device: Any, *, enabled: bool) -> Any:  # noqa: ANN401
    """Autocast to bfloat16, or nothing."""
    import torch

    return torch.autocast(device.type, torch.bfloat16) if enabled else nullcontext()


if __name__ == "__main__":
    main()
