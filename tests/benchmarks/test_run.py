"""The command that takes all tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_it_names_commit_and_machine_and_prints_the_table(project: Path) -> None:
    command = [
        sys.executable,
        project / "benchmarks/run.py",
        "--device",
        "cpu",
        "--only",
        "scan",
        "--quick",
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, _, table = printed.partition("\n\n")
    assert [line.partition(":")[0] for line in head.splitlines()] == [
        "- Command",
        "- Commit",
        "- Machine",
        "- Versions",
    ]
    assert "| numba |" in table


def test_a_benchmark_that_fails_is_named(project: Path) -> None:
    command = [
        sys.executable,
        project / "benchmarks/run.py",
        "--device",
        "nowhere",
        "--only",
        "scan",
        "--quick",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Failed: scan on nowhere." in done.stderr
