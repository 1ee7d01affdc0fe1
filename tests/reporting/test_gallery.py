"""Every image must be there, within its bytes, with outlines where map and mask have them."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from almrr_pipeline.reporting import gallery as galleries
from almrr_pipeline.reporting.examples import Result
from almrr_pipeline.reporting.gallery import (
    build_gallery,
    show_gallery,
    split_budget,
    trace_outlines,
    weigh,
)


def load(name: str) -> Result:
    """Noise of 300 x 200 with a square defect, whose map is 0.8 there and 0.1 around."""
    image = np.random.default_rng(int(name)).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:45] = True
    return image, mask, np.where(mask, 0.8, 0.1).astype(np.float32)


def decode(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def corners(path: str) -> np.ndarray:
    return np.array(re.findall(r"[\d.]+", path), dtype=float).reshape(-1, 2)


def test_a_path_runs_where_the_values_cross_the_level() -> None:
    mask = load("0")[1]
    assert mask is not None
    points = corners(trace_outlines(mask, 0.5, (120, 80)))
    assert points.min(axis=0) == pytest.approx([60, 20], abs=1)
    assert points.max(axis=0) == pytest.approx([90, 40], abs=1)


def test_a_path_stays_inside_the_image_and_is_empty_without_a_crossing() -> None:
    points = corners(trace_outlines(np.ones((4, 4)), 0.5, (8, 8)))
    assert (points.min(), points.max()) == (0.0, 8.0)
    assert trace_outlines(np.zeros((4, 4)), 0.5, (8, 8)) == ""


def test_images_and_maps_are_reduced_to_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_gallery(["0", "1"], load, largest=0.8, threshold=0.4)
    size = built["items"][0]["size"]
    assert max(size) <= 256
    assert size[0] / size[1] == pytest.approx(1.5, abs=0.02)
    assert weigh(built) < 2 * 24_000 * 4 / 3 + 1_000
    values = decode(built["items"][0]["map"])[..., 0] * (0.8 / 255)
    assert values[15, 37] == pytest.approx(0.8, abs=0.03)
    assert values[35, 5] == pytest.approx(0.1, abs=0.03)
    monkeypatch.setattr(galleries, "CATEGORY_BYTES", 10)
    assert max(build_gallery(["0"], load, largest=0.8, threshold=None)["items"][0]["size"]) == 96


def test_tiles_are_sorted_by_score_and_know_their_outcome() -> None:
    built = build_gallery(["0", "1", "2"], load, largest=0.8, threshold=0.4)
    scores = pd.DataFrame(
        {
            "image": ["0", "1", "2"],
            "label": ["defective", "normal", "defective"],
            "defect_type": ["hole", "good", "cut"],
            "score": [0.2, 0.5, 0.9],
            "is_anomalous": [False, True, True],
        }
    )
    shown = show_gallery(built, scores, 0.4)
    assert [tile["outcome"] for tile in shown["tiles"]] == ["found", "false positive", "missed"]
    assert shown["types"] == ["cut", "good", "hole"]


def test_a_page_takes_galleries_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    one = build_gallery(["0"], load, largest=0.8, threshold=0.4)
    monkeypatch.setattr(galleries, "PAGE_BYTES", 2 * weigh(one))
    assert split_budget(dict.fromkeys("abc", one)) == ["a", "b"]
