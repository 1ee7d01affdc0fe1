"""The baseline that recognizes images and sees no defect: it works where a split lets it, and only
there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from almrr_pipeline.baselines.nearest_image import measure_nearest_image
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.region import to_file
from almrr_pipeline.config import DataSettings
from almrr_pipeline.pipelines.baseline import evaluate_nearest_image


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


def test_images_are_read_by_the_range_of_the_category(tmp_path: Path) -> None:
    """12 bits in 16: the test images alone would be taken for darker ones, or be refused."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(8):
        surface = gaussian_filter(generator.normal(0, 9000, (48, 48)), 1.5) + 2000
        values = np.clip(surface, 0, 4095).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
        split, label = "train" if number < 4 else "test", "defective" if number > 5 else "normal"
        rows.append((f"{number}.png", split, label, "uint16", 0, 4095, "", 48, 48, str(number)))
    columns = ["image", "split", "label", "dtype", "low", "high", "white"]
    columns += ["height", "width", "sha256"]
    manifest = pd.DataFrame(rows, columns=columns)
    manifest = manifest.assign(mode="uint16", defect_type=manifest["label"], specimen="")

    decided = evaluate_nearest_image(manifest, to_file(None), tmp_path, DataSettings())
    assert decided["image_auroc"] is not None
    stated = DataSettings(value_range=(0, 4095))
    assert evaluate_nearest_image(manifest, to_file(None), tmp_path, stated) == decided
    with pytest.raises(AlmrrError, match="the range is 0 to 1023"):
        evaluate_nearest_image(
            manifest, to_file(None), tmp_path, DataSettings(value_range=(0, 1023))
        )
