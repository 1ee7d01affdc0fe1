"""Drawings must be well-formed, say what the numbers say, and repeat themselves to the byte."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.reporting.charts import draw_curves, draw_losses, draw_scores

SVG = "{http://www.w3.org/2000/svg}"


def named_path(drawing: str, name: str) -> np.ndarray:
    """Vertices of the path with this title, shape (n, 2)."""
    for group in ElementTree.fromstring(drawing).iter(f"{SVG}g"):
        title, path = group.find(f"{SVG}title"), group.find(f"{SVG}path")
        if title is not None and title.text == name:
            assert path is not None
            pairs = re.findall(r"[\d.]+ [\d.]+", path.attrib["d"])
            return np.array([pair.split() for pair in pairs], dtype=float)
    raise AssertionError(f"no path is called {name}")


def texts(drawing: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


@pytest.fixture
def curve() -> pd.DataFrame:
    return pd.DataFrame({"fpr": [0.0, 0.0, 0.5, 1.0], "tpr": [0.0, 0.6, 1.0, 1.0]})


def test_curve_runs_from_corner_to_corner(curve: pd.DataFrame) -> None:
    vertices = named_path(draw_curves("roc", {"brick": curve}, title="ROC"), "brick")
    left, right, top, bottom = 48, 340, 10, 258
    assert vertices == pytest.approx(
        np.array(
            [
                [left, bottom],
                [left, bottom - 0.6 * (bottom - top)],
                [(left + right) / 2, top],
                [right, top],
            ]
        )
    )


def test_limit_stretches_the_axis_and_ends_it() -> None:
    points = pd.DataFrame({"fpr": [0.0, 0.3], "pro": [0.0, 0.9]})
    drawing = draw_curves("pro", {"brick": points}, title="PRO", limit=0.3)
    assert named_path(drawing, "brick")[-1, 0] == 340
    assert "0.3" in texts(drawing)
    assert "1" in texts(drawing)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=300))
@settings(max_examples=50, deadline=None)
def test_thinning_moves_a_curve_by_no_visible_amount(steps: list[tuple[float, float]]) -> None:
    across, up = (np.cumsum(values) / max(1.0, np.sum(values)) for values in np.array(steps).T)
    points = pd.DataFrame({"fpr": across, "tpr": up})
    kept = named_path(draw_curves("roc", {"x": points}, title="ROC"), "x")
    exact = np.stack([48 + 292 * across, 258 - 248 * up], axis=1)
    starts, ends = kept[:-1, None], kept[1:, None]
    span = ((ends - starts) ** 2).sum(-1)
    along = np.clip(((exact - starts) * (ends - starts)).sum(-1) / np.maximum(span, 1e-12), 0, 1)
    nearest = np.hypot(
        *np.moveaxis(starts + along[..., None] * (ends - starts) - exact, -1, 0)
    ).min(axis=0)
    assert nearest.max() < 0.25


def test_thinning_leaves_few_points() -> None:
    across = np.linspace(0, 1, 10_000)
    drawing = draw_curves(
        "roc", {"x": pd.DataFrame({"fpr": across, "tpr": across**0.1})}, title="ROC"
    )
    assert len(drawing) < 6_000


def test_a_category_keeps_its_color_where_another_has_no_curve(curve: pd.DataFrame) -> None:
    both = draw_curves("roc", {"a": curve, "b": curve}, title="ROC")
    second = draw_curves("roc", {"a": curve.iloc[:0], "b": curve}, title="ROC")
    assert "a" in texts(both)
    assert "a" not in texts(second)
    assert re.findall(r"stroke:(var\(--series-2[^;]*)", both) == re.findall(
        r"stroke:(var\(--series-2[^;]*)", second
    )


def test_many_categories_stay_apart_and_inside(curve: pd.DataFrame) -> None:
    names = [f"mvtec_category_{k}" for k in range(24)]
    drawing = draw_curves("roc", dict.fromkeys(names, curve), title="ROC")
    styles = re.findall(r'style="([^"]*)" /><title>', drawing)
    assert len(set(styles)) == 24
    assert set(names) < set(texts(drawing))
    root = ElementTree.fromstring(drawing)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    labels = [
        (float(text.attrib["x"]), float(text.attrib["y"])) for text in root.iter(f"{SVG}text")
    ]
    assert all(0 < x < width and 0 < y < height for x, y in labels)


def test_drawings_follow_the_theme_and_have_no_identifiers(
    curve: pd.DataFrame, history: pd.DataFrame
) -> None:
    scores = pd.DataFrame({"label": ["normal", "defective"], "score": [0.1, 0.9]})
    for drawing in (
        draw_curves("roc", {"a": curve}, title="t"),
        draw_losses(history, title="t"),
        draw_scores(scores, threshold=0.5, title="t"),
    ):
        root = ElementTree.fromstring(drawing)
        names = {name for element in root.iter() for name in element.attrib}
        assert names <= {"role", "aria-label", "viewBox", "style", "d", "x", "y", "transform"}
        colors = re.findall(r"(?:fill|stroke):([^;\"]+)", drawing)
        assert all(color == "none" or color.startswith("var(--") for color in colors)


def test_hostile_names_stay_text(curve: pd.DataFrame) -> None:
    name = "<script>alert('x')</script>&\""
    drawing = draw_curves("roc", {name: curve}, title=name)
    assert "<script" not in drawing
    assert name in texts(drawing)
    assert ElementTree.fromstring(drawing).attrib["aria-label"] == name


def test_losses_fall_on_the_drawing_as_they_do_in_the_history(history: pd.DataFrame) -> None:
    drawing = draw_losses(history, title="losses")
    loss, refinement = named_path(drawing, "loss"), named_path(drawing, "refinement")
    assert (np.diff(loss[:, 1]) > 0).all()  # y grows downwards
    assert loss[0, 1] < refinement[0, 1]
    # an exponential is straight on a logarithmic scale
    slope = np.polyfit(loss[:, 0], loss[:, 1], 1)
    assert np.abs(np.polyval(slope, loss[:, 0]) - loss[:, 1]).max() < 0.3
    assert "learning rate, up to 0.001" in texts(drawing)


def test_losses_of_a_long_training_stay_small() -> None:
    step = np.arange(1, 20_001)
    noise = np.random.default_rng(0).random(20_000)
    history = pd.DataFrame(
        {"step": step, "loss": 1 + noise, "reconstruction": noise, "refinement": noise / 2}
    )
    assert len(draw_losses(history, title="losses")) < 40_000


@pytest.mark.parametrize(
    "values", [[], [0.0, 0.0], [np.nan, np.inf], [1.0], [1.0, -1.0, 2.0], [1e-9, 1e9]]
)
def test_losses_of_any_values_can_be_drawn(values: list[float]) -> None:
    history = pd.DataFrame({"step": np.arange(len(values)), "loss": np.array(values, float)})
    drawing = draw_losses(history, title="losses")
    ElementTree.fromstring(drawing)
    assert "nan" not in drawing
    assert "inf" not in drawing


def test_histogram_shows_fractions_of_each_class() -> None:
    scores = pd.DataFrame(
        {"label": ["normal"] * 10 + ["defective"] * 2, "score": [0.1] * 10 + [0.8, 0.9]}
    )
    drawing = draw_scores(scores, threshold=0.5, title="scores")
    normal, defective = named_path(drawing, "normal"), named_path(drawing, "defective")
    assert (218 - normal[:, 1]).max() == pytest.approx(
        2 * (218 - defective[:, 1]).max(), abs=0.3
    )  # 100 % and 50 %
    line = named_path(drawing, "threshold 0.5")[:, 0]
    assert normal[:, 0].max() < line[0] < defective[:, 0].min()
    assert {"normal (10)", "defective (2)", "threshold 0.5"} < set(texts(drawing))


def test_histogram_keeps_a_far_threshold_inside() -> None:
    scores = pd.DataFrame({"label": ["defective"] * 3, "score": [0.1, 0.2, 0.3]})
    drawing = draw_scores(scores, threshold=2.0, title="scores")
    assert 48 < named_path(drawing, "threshold 2")[0, 0] < 460
    assert "normal (0)" not in texts(drawing)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5], [np.nan, 0.2]])
def test_histogram_of_any_scores_can_be_drawn(values: list[float]) -> None:
    scores = pd.DataFrame({"label": ["normal"] * len(values), "score": np.array(values, float)})
    drawing = draw_scores(scores, threshold=None, title="scores")
    ElementTree.fromstring(drawing)
    assert "nan" not in drawing


def test_drawings_repeat_to_the_byte(curve: pd.DataFrame, history: pd.DataFrame) -> None:
    assert draw_curves("roc", {"a": curve}, title="t") == draw_curves(
        "roc", {"a": curve.copy()}, title="t"
    )
    assert draw_losses(history, title="t") == draw_losses(history.copy(), title="t")


def test_missing_columns_are_named(curve: pd.DataFrame) -> None:
    with pytest.raises(AlmrrError, match="precision"):
        draw_curves("pr", {"brick": curve}, title="t")
    with pytest.raises(AlmrrError, match="loss"):
        draw_losses(curve, title="t")
    with pytest.raises(AlmrrError, match="score"):
        draw_scores(curve, threshold=None, title="t")
