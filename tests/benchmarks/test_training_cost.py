"""The benchmark of training measures what it says, here at small widths."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def test_both_ways_of_training_are_measured(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project / "benchmarks")
    spec = importlib.util.spec_from_file_location("training_benchmark", project / "benchmarks" / "training.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "training_benchmark", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZE", (128, 128))
    arguments = ["--device", "cpu", "--small", "--batch", "2", "--steps", "2", "--samples", "4"]
    (theirs, ours), pool_seconds = module.compare(module.parse([*arguments, "--authors-scan", "torch"]), tmp_path)
    assert (theirs.way, ours.way) == ("the authors' way", "ours")
    for row in (theirs, ours):
        assert 0 < row.step.low <= row.step.median <= row.step.high
        assert 0 < row.data.median < row.step.median
    assert pool_seconds > 0
    assert "| ours |" in ours.describe(2)
