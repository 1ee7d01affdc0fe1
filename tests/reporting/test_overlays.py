"""What the images must show: the right tiles, outlines that surround, colors in order."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from PIL import Image
from scipy import ndimage

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.reporting.overlays import (
    FOUND_COLOR,
    TRUTH_COLOR,
    color_map,
    draw_overlay,
    draw_panel,
    encode_image,
    heat_end,
    outline,
)

PANEL_WIDTH = 4 * 272 + 5 * 6
HEAT = color_map(np.linspace(0.0, 1.0, 256)[None])[0]


@pytest.fixture
def image() -> np.ndarray:
    return np.full((272, 272, 3), 128, np.uint8)


@pytest.fixture
def square() -> np.ndarray:
    mask = np.zeros((272, 272), bool)
    mask[100:150, 60:140] = True
    return mask


def tile(panel: np.ndarray, column: int) -> np.ndarray:
    """One of the four images of a panel whose image has the tile's size."""
    left = 6 + column * (272 + 6)
    return panel[6 : 6 + 272, left : left + 272]


def colored(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.asarray((image == color).all(axis=-1))


def test_heat_lightness_rises_evenly() -> None:
    rgb = HEAT / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(
        luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance
    )  # CIE L*
    steps = np.diff(lightness[:: len(lightness) // 16])
    assert (steps > 0).all()
    assert steps.max() < 3 * steps.min()


def test_heat_table_is_inferno() -> None:
    expected = np.asarray(colormaps["inferno"].colors) * 255
    assert np.abs(HEAT - expected).max() <= 1.0


def test_prediction_imports_matplotlib_only_to_draw() -> None:
    code = (
        "import sys, almrr_pipeline.reporting.predict_files; sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("threshold", [0.02, 0.4, 0.7])
def test_what_is_found_is_never_dull(threshold: float) -> None:
    above = color_map(np.array([[threshold * 1.01]]), heat_end(threshold))[0, 0]
    assert above[0] > 200  # orange, whatever the threshold
    assert above[1] > 70
    below = color_map(np.array([[threshold / 2]]), heat_end(threshold))[0, 0]
    assert below[0] < 130


def test_color_map_has_a_fixed_scale_and_clips() -> None:
    colors = color_map(np.array([[-3.0, 0.0, 1.0, 7.0, np.nan]]))
    assert (colors[0, [0, 1, 4]] == HEAT[0]).all()
    assert (colors[0, [2, 3]] == HEAT[255]).all()
    assert (color_map(np.full((2, 2), 0.2)) != HEAT[255]).any()


@given(
    corner=st.tuples(st.integers(4, 20), st.integers(4, 20)),
    extent=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    width=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_outline_surrounds_the_region(
    corner: tuple[int, int], extent: tuple[int, int], width: int
) -> None:
    region = np.zeros((40, 40), bool)
    region[corner[0] : corner[0] + extent[0], corner[1] : corner[1] + extent[1]] = True
    line = outline(region, width=width)
    assert not (line & region).any()
    outside, _ = ndimage.label(~line)  # 4-connected: a closed line leaves no way out
    assert set(np.unique(outside[region])).isdisjoint(np.unique(outside[0]))
    assert line.sum() == (extent[0] + 2 * width) * (extent[1] + 2 * width) - extent[0] * extent[1]


def test_outline_of_nothing_is_nothing() -> None:
    assert not outline(np.zeros((5, 5), bool), width=2).any()


@pytest.mark.parametrize(("rows", "columns"), [(272, 272), (100, 40), (700, 1024), (3, 900)])
def test_panel_has_four_tiles_whatever_the_shape(rows: int, columns: int) -> None:
    image = np.zeros((rows, columns, 3), np.uint8)
    panel = draw_panel(
        image, np.zeros((rows, columns), bool), np.zeros((64, 64), np.float32), threshold=0.5
    )
    height = max(1, round(rows * 272 / max(rows, columns)))
    assert panel.dtype == np.uint8
    assert panel.shape == (height + 2 * 6 + 26, PANEL_WIDTH, 3)


def test_panel_shows_image_truth_heat_and_outlines(image: np.ndarray, square: np.ndarray) -> None:
    heat = np.where(np.roll(square, 30, axis=0), 0.9, 0.1).astype(np.float32)
    panel = draw_panel(image, square, heat, threshold=0.5)
    assert (tile(panel, 0) == image).all()
    assert (colored(tile(panel, 1), (255, 255, 255)) == square).all()
    assert (tile(panel, 2) == color_map(heat, 0.8)).all()
    assert (colored(tile(panel, 3), FOUND_COLOR) == outline(heat > 0.5, width=2)).all()
    truth = colored(tile(panel, 3), TRUTH_COLOR)
    assert truth.any()
    assert not (truth & ~outline(square, width=1)).any()


def test_panel_draws_the_ground_truth_alone_without_a_threshold(
    image: np.ndarray, square: np.ndarray
) -> None:
    panel = tile(draw_panel(image, square, square.astype(np.float32), threshold=None), 3)
    assert (colored(panel, TRUTH_COLOR) == outline(square, width=1)).all()
    assert not colored(panel, FOUND_COLOR).any()


def test_panel_tells_a_missing_mask_from_an_empty_one(image: np.ndarray) -> None:
    heat = np.zeros((272, 272), np.float32)
    absent = draw_panel(image, None, heat, threshold=0.5)
    empty = draw_panel(image, np.zeros((272, 272), bool), heat, threshold=0.5)
    assert (tile(absent, 1) == tile(empty, 1)).all()
    assert (absent != empty).any()


def test_panel_brings_map_and_mask_to_the_image(image: np.ndarray) -> None:
    mask, heat = np.zeros((8, 8), bool), np.zeros((16, 16), np.float32)
    mask[:4], heat[:8] = True, 1.0
    panel = draw_panel(image, mask, heat, threshold=0.5)
    assert (colored(tile(panel, 1), (255, 255, 255)) == (np.arange(272) < 136)[:, None]).all()
    found = np.flatnonzero(colored(tile(panel, 3), FOUND_COLOR)[:, 100])
    assert abs(found.min() - 136) <= 1


def test_panel_centers_an_image_that_is_taller_than_wide() -> None:
    panel = draw_panel(
        np.full((272, 72, 3), 255, np.uint8), None, np.zeros((8, 8), np.float32), threshold=None
    )
    white = np.flatnonzero((tile(panel, 0) == 255).all(axis=(0, 2)))
    assert (white.min(), white.max()) == (100, 171)


def test_drawing_leaves_its_arguments_alone(image: np.ndarray, square: np.ndarray) -> None:
    heat = square.astype(np.float32)
    before = image.copy(), square.copy(), heat.copy()
    draw_panel(image, square, heat, threshold=0.5)
    draw_overlay(image, heat, threshold=0.5, score=0.7, is_anomalous=True)
    assert all((a == b).all() for a, b in zip(before, (image, square, heat), strict=True))


def test_drawing_refuses_shapes_it_cannot_draw(image: np.ndarray) -> None:
    with pytest.raises(AlmrrError, match=r"\(272, 272\)"):
        draw_panel(image[..., 0], None, np.zeros((8, 8), np.float32), threshold=None)
    with pytest.raises(AlmrrError, match="map"):
        draw_overlay(
            image, np.zeros((1, 8, 8), np.float32), threshold=None, score=0.0, is_anomalous=None
        )


def test_overlay_keeps_the_image_where_nothing_is_anomalous() -> None:
    image = np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8)
    overlay = draw_overlay(
        image, np.zeros((32, 32), np.float32), threshold=0.5, score=0.1, is_anomalous=False
    )
    assert (overlay[:400] == image).all()
    assert overlay.shape[0] > 400
    assert overlay.shape[1] == 500


def test_overlay_outlines_and_warms_the_defect(image: np.ndarray, square: np.ndarray) -> None:
    overlay = draw_overlay(
        image, square.astype(np.float32), threshold=0.5, score=0.9, is_anomalous=True
    )
    drawn = overlay[: 272 * 2 : 2, ::2]
    assert colored(drawn, FOUND_COLOR).any()
    expected = 0.4 * 128 + 0.6 * HEAT[255].astype(
        float
    )  # heat at its strongest lets 40 % of the image through
    assert np.abs(drawn[105:145, 65:135] - expected).max() <= 0.5


def test_overlay_is_the_same_in_bands(
    image: np.ndarray, square: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"threshold": 0.5, "score": 0.9, "is_anomalous": True}
    whole = draw_overlay(image, square.astype(np.float32), **drawn)
    monkeypatch.setattr("almrr_pipeline.reporting.overlays._BAND", 7)
    np.testing.assert_array_equal(draw_overlay(image, square.astype(np.float32), **drawn), whole)


def test_overlay_states_its_three_verdicts_differently(image: np.ndarray) -> None:
    heat = np.zeros((8, 8), np.float32)
    strips = [
        draw_overlay(image, heat, threshold=None, score=0.5, is_anomalous=verdict).tobytes()
        for verdict in (True, False, None)
    ]
    assert len(set(strips)) == 3


def test_overlay_enlarges_a_narrow_image() -> None:
    overlay = draw_overlay(
        np.zeros((50, 100, 3), np.uint8),
        np.zeros((8, 8), np.float32),
        threshold=0.5,
        score=1.0,
        is_anomalous=True,
    )
    assert overlay.shape[1] == 400


def test_encoding_keeps_size_and_colors_and_repeats_itself(
    image: np.ndarray, square: np.ndarray
) -> None:
    panel = draw_panel(image, square, square.astype(np.float32), threshold=0.5)
    encoded = encode_image(panel)
    decoded = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    assert decoded.shape == panel.shape
    assert np.abs(decoded - panel).mean() < 4
    assert encoded == encode_image(panel)
