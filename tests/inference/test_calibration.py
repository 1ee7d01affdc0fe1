from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from almrr_pipeline.config import Tiling
from almrr_pipeline.inference.calibration import calibrate
from almrr_pipeline.inference.inference_config import Thresholds
from almrr_pipeline.inference.map_predictor import MapPredictor


def _calibrate(
    model: nn.Module, paths: list[Path], *, rate: float = 0.25, tiling: Tiling | None = None
) -> Thresholds:
    predictor = MapPredictor(model, (32, 32), tiling or Tiling(), 2, torch.device("cpu"))
    return calibrate(predictor, paths, smoothing=3, false_alarm_rate=rate)


def _dots(levels: list[int]) -> list[np.ndarray]:
    """Black images with one bright pixel in the middle."""
    images = [np.zeros((32, 32, 3), dtype=np.uint8) for _ in levels]
    for image, level in zip(images, levels, strict=True):
        image[16, 16] = level
    return images


@pytest.mark.parametrize("tiling", [Tiling(), Tiling(enabled=True)], ids=["whole", "tiles"])
def test_thresholds_by_hand(brightness: nn.Module, write_images, tiling: Tiling) -> None:
    paths = write_images(_dots([90, 180, 45]))
    # Rank ceil((3 + 1) x 0.75) = 3 of 3: the largest. A dot's score is a ninth of its level.
    thresholds = _calibrate(brightness, paths, tiling=tiling)
    assert thresholds.pixel.value == pytest.approx(180 / 255)
    assert thresholds.image.value == pytest.approx(180 / 255 / 9)
    assert (thresholds.image.normals, thresholds.image.guaranteed_rate) == (3, 0.25)


def test_copies_of_an_image_count_once(
    brightness: nn.Module, write_images, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_images(_dots([90, 180, 90, 90, 45]))
    again = tmp_path / "again.bmp"  # the same pixels in another format
    Image.open(paths[1]).save(again)
    thresholds = _calibrate(brightness, [*paths, again])
    assert thresholds == _calibrate(brightness, [paths[0], paths[1], paths[4]])
    assert thresholds.image.normals == 3
    assert "3 of 6 normal images are copies of others" in caplog.text


def test_a_higher_rate_gives_lower_thresholds(brightness: nn.Module, write_images) -> None:
    paths = write_images(_dots([90, 180, 45]))
    assert _calibrate(brightness, paths, rate=0.5).pixel.value == pytest.approx(
        90 / 255
    )  # rank 2 of 3


def test_no_validation_image_is_above_where_the_rate_is_small(
    brightness: nn.Module, write_images
) -> None:
    thresholds = _calibrate(brightness, write_images(_dots([1, 2, 3])), rate=0.01)
    assert thresholds.pixel.value == pytest.approx(3 / 255)
    assert thresholds.pixel.guaranteed_rate == pytest.approx(0.25)


def test_without_images_both_are_undefined_and_say_why(brightness: nn.Module) -> None:
    thresholds = _calibrate(brightness, [])
    assert thresholds.image.value is None
    assert thresholds.pixel.value is None
    assert "held out" in (thresholds.image.undefined or "")


def test_the_two_guarantees_name_their_events(brightness: nn.Module, write_images) -> None:
    thresholds = _calibrate(brightness, write_images(_dots([1, 2, 3])))
    assert "is called defective" in thresholds.image.guarantee
    assert "shows an outline" in thresholds.pixel.guarantee


def test_the_guaranteed_rate_is_kept_on_average(brightness: nn.Module, write_images) -> None:
    """Exchangeable images: over many draws a new one is above the threshold at that rate."""
    generator = np.random.default_rng(0)
    levels = generator.permutation(250)[:60]  # distinct, so that the promise is met exactly
    peaks = [level / 255 for level in levels]
    alarms = 0
    rounds = 12
    for _ in range(rounds):
        order = generator.permutation(60)
        thresholds = _calibrate(
            brightness, write_images(_dots([int(levels[i]) for i in order[:9]])), rate=0.2
        )
        value = thresholds.pixel.value
        assert value is not None
        alarms += sum(np.float32(peaks[i]) > value for i in order[9:])
    assert alarms / (rounds * 51) == pytest.approx(0.2, abs=0.1)
