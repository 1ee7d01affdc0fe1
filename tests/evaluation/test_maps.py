from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from almrr_pipeline.common.masks import MaskReading
from almrr_pipeline.config import EvaluateSettings
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.evaluation.maps import (
    AnomalyMaps,
    GroundTruth,
    report_small_regions,
    tabulate_scores,
)


@pytest.fixture
def maps(tmp_path: Path) -> AnomalyMaps:
    folder = tmp_path / "maps"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index, size in enumerate(((6, 8), (4, 4), (5, 5))):
        np.save(folder / f"{index:06d}.npy", generator.random(size, np.float32))
    return AnomalyMaps.load(folder)


@pytest.fixture
def truth(tmp_path: Path, maps: AnomalyMaps) -> GroundTruth:
    large = np.zeros((12, 16), np.uint8)
    large[2:6, 4:10] = 255
    Image.fromarray(large).save(tmp_path / "large.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "empty.png")
    return GroundTruth([tmp_path / "large.png", None, tmp_path / "empty.png"], maps)


def test_maps_come_back_in_their_order_and_size(maps: AnomalyMaps) -> None:
    assert [anomaly_map.shape for anomaly_map in maps] == [(6, 8), (4, 4), (5, 5)]
    assert [maps.size(index) for index in range(len(maps))] == [(6, 8), (4, 4), (5, 5)]


def test_a_mask_is_read_at_the_size_of_its_map(truth: GroundTruth) -> None:
    mask = truth[0]
    assert mask is not None
    expected = np.zeros((6, 8), bool)
    expected[1:3, 2:5] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("reading", "said"),
    [
        (None, "they hold 0, 100, 127, and values above half of white are anomalous"),
        (MaskReading(threshold=180), "by data.mask_threshold values above 180 are anomalous"),
        (MaskReading(values=(1, 200)), "by data.mask_values 1, 200 is anomalous"),
    ],
)
def test_masks_without_an_anomalous_pixel_say_why(
    tmp_path: Path, maps: AnomalyMaps, reading: MaskReading | None, said: str
) -> None:
    for name, value in (("a", 100), ("b", 127)):
        mask = np.zeros((12, 16), np.uint8)
        mask[2:6, 4:10] = value
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    truth = GroundTruth([tmp_path / "a.png", None, tmp_path / "b.png"], maps, reading)
    settings = EvaluateSettings(bootstrap=0)
    none, labels = (None, None), [True, False, True]
    found = evaluate(maps, truth, [0.5] * 3, labels, ["a", "", "b"], settings, thresholds=none)
    reason = found.metrics["undefined"]["pixel_ap"]
    assert reason.startswith("no anomalous pixel in any mask: they hold 0, 100, 127")
    assert said in reason
    assert "they hold 0, 127," in found.metrics["defect_types"]["b"]["undefined"]["pixel_ap"]


def test_regions_of_few_pixels_are_counted_and_named(
    tmp_path: Path, maps: AnomalyMaps, truth: GroundTruth, caplog: pytest.LogCaptureFixture
) -> None:
    assert report_small_regions(truth) == (1, 0)
    assert caplog.text == ""
    scratch = np.zeros((400, 16), np.uint8)
    scratch[201, 3] = 255
    Image.fromarray(scratch).save(tmp_path / "large.png")

    assert report_small_regions(truth) == (1, 1)
    assert "1 of 1 defect regions have fewer than 4 pixels" in caplog.text


def test_an_image_without_mask_has_none(truth: GroundTruth) -> None:
    assert truth[1] is None


def test_a_table_of_scores_says_what_each_image_got(maps: AnomalyMaps, truth: GroundTruth) -> None:
    rows = pd.DataFrame(
        {
            "image": ["a", "b", "c"],
            "label": ["defective", "normal", "defective"],
            "defect_type": ["hole", "good", "dent"],
        },
        index=[7, 8, 9],
    )
    table = tabulate_scores(rows, maps, truth, scores=[0.9, 0.2, 0.5], threshold=0.5)
    mask = truth[0]
    assert mask is not None
    columns = ["image", "label", "defect_type", "score", "is_anomalous", "pixel_ap"]
    assert list(table) == columns
    assert list(table["is_anomalous"]) == [True, False, False]
    assert table["pixel_ap"][0] == pytest.approx(
        average_precision_score(mask.ravel(), maps[0].ravel())
    )
    assert table["pixel_ap"][1:].isna().all()


def test_without_a_threshold_there_is_no_verdict(maps: AnomalyMaps, truth: GroundTruth) -> None:
    rows = pd.DataFrame({"image": ["a", "b", "c"], "label": "normal", "defect_type": "good"})
    table = tabulate_scores(rows, maps, truth, scores=[0.9, 0.2, 0.5], threshold=None)
    assert table["is_anomalous"].isna().all()
