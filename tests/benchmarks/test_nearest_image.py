"""The baseline that recognizes images and sees no defect: it works where a split lets it, and only
there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from almrr_pipeline.datasets.manifest import Item


@pytest.fixture
def nearest_image(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("baselines/nearest_image")


@pytest.mark.parametrize("leaks", [True, False])
def test_twins_in_training_are_all_it_takes(
    nearest_image: ModuleType, tmp_path: Path, leaks: bool
) -> None:
    generator = np.random.default_rng(0)
    surfaces = [
        gaussian_filter(generator.normal(0.0, 60.0, (96, 96)), 1.5) + 100.0 for _ in range(30)
    ]

    def item(number: int, gain: float, split: str, label: str) -> Item:
        path = tmp_path / f"{number}_{gain}.png"
        Image.fromarray(np.clip(gain * surfaces[number], 0, 255).astype(np.uint8)).save(path)
        return Item(path, None, split, label, "good" if label == "normal" else "hole")

    items = [item(k, 1.0, "train", "normal") for k in range(10)]
    items += [item(k if leaks else k + 10, 0.8, "test", "normal") for k in range(10)]
    items += [item(k, 0.8, "test", "defective") for k in range(20, 30)]
    figures = nearest_image.evaluate(items)

    assert figures["normal_with_twin"] == float(leaks)
    assert figures["defective_with_twin"] == 0.0
    assert figures["image_auroc_hole"] == figures["image_auroc"]
    assert (figures["image_auroc"] == 1.0) == leaks
