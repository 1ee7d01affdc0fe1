"""Images unlike those of the calibration are told, and images like them are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from scipy.ndimage import gaussian_filter

from almrr_pipeline.cli import almrr
from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.looks import Look, UsualLook, find_usual, measure_look

Change = Callable[[ImageArray], np.ndarray]


def _surface(seed: int, *, defect: bool = False) -> ImageArray:
    """A texture whose light and contrast vary by some percent from image to image."""
    generator = np.random.default_rng(seed)
    noise = gaussian_filter(generator.normal(size=(64, 64)), 1.0)
    gray = generator.normal(120, 8) + generator.normal(30, 2) * noise / noise.std()
    if defect:
        gray[20:30, 20:40] = 20
    return np.clip(gray, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def calibrated(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    images = folder / "normal"
    images.mkdir()
    for seed in range(20):
        Image.fromarray(_surface(seed)).save(images / f"{seed}.png")
    model = shutil.copytree(model_folder, folder / "model")
    result = CliRunner().invoke(almrr, ["calibrate", str(model), str(images)])
    assert result.exit_code == 0, result.output
    return model


def _predict(model: Path, folder: Path, change: Change, *options: str, count: int = 6) -> Result:
    (folder / "new").mkdir()
    for seed in range(100, 100 + count):
        path = folder / f"new/{seed}.png"
        Image.fromarray(change(_surface(seed, defect=seed % 2 == 0))).save(path)
    words = ["predict", str(model), str(folder / "new"), "-o", str(folder / "out")]
    return CliRunner().invoke(almrr, [*words, "--no-overlays", *options])


def _tall(image: ImageArray) -> ImageArray:
    return np.tile(image, (5, 1))


@pytest.mark.parametrize(("change", "count"), [(lambda i: i, 6), (lambda i: i, 1), (_tall, 2)])
def test_images_like_those_of_the_calibration_give_no_warning(
    calibrated: Path, tmp_path: Path, change: Change, count: int
) -> None:
    result = _predict(calibrated, tmp_path, change, count=count)
    assert result.exit_code == 0, result.output
    assert "WARNING" not in result.stderr


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda image: image // 2, (), "6 are darker"),
        (lambda image: np.minimum(image.astype(int) + 90, 255).astype(np.uint8), (), "brighter"),
        (lambda image: gaussian_filter(image, 2), (), "6 are less sharp"),
        # 12 bits in 16, read as if all 16 were used
        (
            lambda image: image.astype(np.uint16) * 16,
            ("--value-range", "0", "65535"),
            "6 are darker",
        ),
    ],
)
def test_another_exposure_focus_or_encoding_is_one_warning_at_the_end(
    calibrated: Path, tmp_path: Path, change: Change, options: tuple[str, ...], said: str
) -> None:
    result = _predict(calibrated, tmp_path, change, *options)
    assert result.exit_code == 0, result.output
    (warning,) = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert warning.startswith("WARNING: Of 6 images ")
    assert said in warning


def test_a_model_without_them_is_read_and_says_nothing(model_folder: Path, tmp_path: Path) -> None:
    content = json.loads((model_folder / "inference.json").read_text())
    del content["thresholds"]["usual"]
    config = InferenceConfig.model_validate(content)
    assert config.thresholds is not None
    assert config.thresholds.usual is None
    assert "WARNING" not in _predict(model_folder, tmp_path, lambda image: image // 2).stderr


def test_the_statistics_of_an_image() -> None:
    columns = np.tile(np.array([0, 100], np.uint8), (300, 4))
    image = np.repeat(columns[..., None], 3, axis=2)
    assert measure_look(image) == Look(50, 50, 100)
    assert measure_look(image[:, :1]) == Look(0, 0, 0)


def test_the_limits_are_the_quantiles_widened_by_their_distance_and_a_tenth() -> None:
    looks = [Look(100 + k, 50, 10) for k in range(21)]  # quantiles 101 and 119: width 18
    usual = find_usual(looks)
    assert usual == UsualLook(brightness=(101, 119), contrast=(50, 50), sharpness=(10, 10))
    assert find_usual(looks[:4]) is None
    # (101 - 18) * .9 - .5 = 74.2; (119 + 18) * 1.1 + .5 = 151.2; 44.5, 55.5; 8.5, 11.5
    assert usual.differences(Look(74.3, 55.4, 8.6)) == ()
    assert usual.differences(Look(74.1, 55.6, 8.4)) == (
        "darker",
        "higher in contrast",
        "less sharp",
    )
    assert usual.differences(Look(151.3, 44.4, 11.6)) == (
        "brighter",
        "lower in contrast",
        "sharper",
    )
