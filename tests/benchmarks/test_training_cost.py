"""The benchmark of training measures what it says, here at small widths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_both_ways_of_training_are_measured(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_benchmark("training")
    monkeypatch.setattr(module, "SIZE", (128, 128))
    arguments = ["--device", "cpu", "--small", "--batch", "2", "--steps", "2", "--samples", "4"]
    (theirs, ours), synthetic_set_seconds = module.compare(
        module.parse([*arguments, "--authors-scan", "torch"]), tmp_path
    )
    assert (theirs.way, ours.way) == ("the authors' way", "ours")
    for row in (theirs, ours):
        assert 0 < row.step.low <= row.step.median <= row.step.high
        assert 0 < row.data.median < row.step.median
    assert synthetic_set_seconds > 0
    assert "| ours |" in ours.describe(2)
