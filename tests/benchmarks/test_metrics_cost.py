"""The benchmark of the metrics measures what it says, here on a small test set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def test_the_figures_of_a_small_test_set(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_benchmark("metrics")
    for name, value in {"NORMAL": 2, "DEFECTIVE": 5, "SIDE": 64}.items():
        monkeypatch.setattr(module, name, value)
    figures = module.measure_evaluation(tmp_path, 0.1, 10)
    assert figures["megapixels"] == pytest.approx(7 * 64 * 64 / 1e6)
    assert 0.01 < figures["defective_fraction"] < 0.1
    assert figures["seconds"] > 0
    assert figures["seconds_with_intervals"] > 0


def test_memory_of_scikit_learn_grows_by_its_copies_of_all_pixels(
    load_benchmark: Callable[[str], ModuleType],
) -> None:
    needed = load_benchmark("metrics").measure_scikit_learn(1 << 20)
    assert (
        needed is None or needed > 20
    )  # float32 scores, their order (8 bytes), and counts (8 bytes) at least
