"""The command that takes all tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_it_names_commit_and_machine_and_prints_the_tables(project: Path) -> None:
    command = ["benchmarks/run.py", "--device", "cpu", "--quick"]
    command += ["--only", "scan", "regional_features"]
    printed = subprocess.run(
        [sys.executable, *command], cwd=project, capture_output=True, text=True, check=True
    ).stdout
    head, _, tables = printed.partition("\n\n")
    lines = head.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "- Command",
        "- Commit",
        "- Machine",
        "- Versions",
    ]
    assert lines[0] == f"- Command: `python {' '.join(command)}`"
    assert "| numba |" in tables
    rows = [line for line in tables.splitlines() if "two matrices" in line]
    assert len(rows) == 2
    assert all(float(row.split("|")[6]) < 1e-5 for row in rows)


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
