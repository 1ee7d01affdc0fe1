"""The sweep over constants of the scan's Triton kernels runs through in the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scan.py"


def test_a_sweep_writes_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "sweep.json"
    command = [
        "--device",
        "cpu",
        "--sweep",
        "--repeats",
        "1",
        "--seconds",
        "12",
        "--shape",
        "1",
        "9",
        "3",
        "2",
        "--json",
    ]
    subprocess.run(
        [sys.executable, SCRIPT, *command, path, "--shape", "1", "9", "3", "2"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["constants"] for row in rows[:2]] == [{}, {"_PROGRAMS": 1}]
    for row in rows:
        assert row["called both, us"] > 0
        assert row["differs"] < 1e-6
