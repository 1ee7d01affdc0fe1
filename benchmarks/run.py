"""All tables of docs/performance.md with one command, as Markdown.

Machine, commit and command come first.

    python benchmarks/run.py [--device cpu|cuda] [--only regional_features scan model training
        anomalib_peers prediction] [--quick]

Each benchmark runs in a process of its own, so that none inherits another's memory; within a
benchmark both sides of every comparison are measured in one run. Without --device a CUDA device
follows the CPU where there is one. --quick makes each measurement once and small: it shows that
everything runs, and its figures mean little.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
QUICK = {
    "regional_features": ["--quick"],
    "scan": ["--shape", "1", "64", "64", "16", "--repeats", "1"],
    "model": ["--quick"],
    "training": ["--small", "--batch", "2", "--steps", "2", "--samples", "8"],
    "anomalib_peers": ["--quick"],
    "prediction": ["--quick"],
}


def main() -> None:
    """Run the benchmarks one after the other; exit with 1 if one of them fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", action="append", help="may be given twice")
    parser.add_argument("--only", nargs="+", choices=QUICK, default=list(QUICK))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    devices = arguments.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    print(describe_run(), flush=True)
    failed = []
    for name in arguments.only:
        for device in devices:
            print(flush=True)
            command = [
                sys.executable,
                HERE / f"{name}.py",
                "--device",
                device,
                *(QUICK[name] if arguments.quick else []),
            ]
            if subprocess.run(command, check=False).returncode:
                failed.append(f"{name} on {device}")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


def describe_run() -> str:
    """Machine, versions, commit and command as a list in Markdown."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines = {
        "Command": f"`{shlex.join(['python', 'benchmarks/run.py', *sys.argv[1:]])}`",
        "Commit": read_commit(),
        "Machine": f"{read_processor()}, {torch.get_num_threads()} threads"
        + "".join(f"; {name}" for name in devices),
        "Versions": ", ".join(
            f"{name} {read_version(name)}" for name in ("torch", "timm", "numba", "triton")
        ),
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def read_commit() -> str:
    """The commit that was measured, and whether files differ from it."""
    commands = (
        ["git", "rev-parse", "--short", "HEAD"],
        ["git", "status", "--porcelain", "--untracked-files=no"],
    )
    try:
        commit, changes = (
            subprocess.run(
                command, cwd=HERE, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with changes" if changes else "")


def read_processor() -> str:
    """The processor's name, as Linux knows it, else as Python does."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def read_version(package: str) -> str:
    """An installed package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
