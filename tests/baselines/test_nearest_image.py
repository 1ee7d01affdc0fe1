"""The baseline that recognizes images and sees no defect: it works where a split lets it, and only
there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from almrr_pipeline.baselines.nearest_image import measure_nearest_image


@pytest.mark.parametrize("leaks", [True, False])
def test_twins_in_training_are_all_it_takes(tmp_path: Path, leaks: bool) -> None:
    generator = np.random.default_rng(0)
    surfaces = [
        gaussian_filter(generator.normal(0.0, 60.0, (96, 96)), 1.5) + 100.0 for _ in range(30)
    ]

    def draw(number: int, gain: float) -> Path:
        path = tmp_path / f"{number}_{gain}.png"
        Image.fromarray(np.clip(gain * surfaces[number], 0, 255).astype(np.uint8)).save(path)
        return path

    tested = [draw(k if leaks else k + 10, 0.8) for k in range(10)]
    tested += [draw(k, 0.8) for k in range(20, 30)]
    labels, types = [False] * 10 + [True] * 10, ["good"] * 10 + ["hole"] * 10
    figures = measure_nearest_image([draw(k, 1.0) for k in range(10)], tested, labels, types)

    assert figures["normal_with_twin"] == float(leaks)
    assert figures["defective_with_twin"] == 0.0
    assert figures["defect_types"]["hole"]["image_auroc"] == figures["image_auroc"]
    assert (figures["image_auroc"] == 1.0) == leaks


def test_without_normal_test_images_nothing_is_ranked(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    Image.fromarray(np.eye(32, dtype=np.uint8) * 200).save(path)
    figures = measure_nearest_image([path], [path], [True], ["hole"])
    assert figures["image_auroc"] is None
    assert figures["normal_with_twin"] is None
    assert figures["defective_with_twin"] == 1.0
