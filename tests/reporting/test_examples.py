"""The choice of examples must be just and repeatable: the clearest, the usual, the errors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.reporting.examples import (
    Overlay,
    caption_example,
    choose_examples,
    draw_examples,
    pack_examples,
    read_examples,
)


def _write(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def table(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame(columns)


@pytest.fixture
def scores() -> pd.DataFrame:
    """9 defects, score rising, d0, d1 missed; 5 normals, score falling, n0 a false positive."""
    defective, normal = np.linspace(0.1, 0.9, 9), np.linspace(0.6, 0.0, 5)
    return table(
        image=[f"d{k}.png" for k in range(9)] + [f"n{k}.png" for k in range(5)],
        label=["defective"] * 9 + ["normal"] * 5,
        defect_type=["scratch"] * 9 + ["good"] * 5,
        score=[*defective, *normal],
        is_anomalous=[*(defective > 0.25), *(normal > 0.5)],
    )


def test_examples_are_best_typical_and_worst(scores: pd.DataFrame) -> None:
    chosen = {kind: list(rows["image"]) for kind, rows in choose_examples(scores, 3).items()}
    assert chosen["best"] == ["d8.png", "d7.png", "d6.png"]
    assert chosen["worst"] == ["d0.png", "n0.png", "d1.png"]
    assert chosen["typical"] == ["d4.png", "d3.png", "n2.png"]


def test_examples_do_not_depend_on_the_order_of_rows(scores: pd.DataFrame) -> None:
    scores["score"] = scores["score"].round(0)  # many ties
    shuffled = scores.sample(frac=1.0, random_state=1)
    first, second = choose_examples(scores, 2), choose_examples(shuffled, 2)
    assert all(list(first[kind]["image"]) == list(second[kind]["image"]) for kind in first)


def test_examples_weigh_how_well_the_defect_was_located(scores: pd.DataFrame) -> None:
    scores["pixel_ap"] = [0.5] * 8 + [0.0] + [np.nan] * 5
    best = choose_examples(scores, 1)["best"]
    assert list(best["image"]) == ["d7.png"]


def test_missed_defects_are_never_the_best(scores: pd.DataFrame) -> None:
    scores["is_anomalous"] = scores["label"] == "normal"
    chosen = choose_examples(scores, 3)
    assert chosen["best"].empty
    assert len(chosen["worst"]) == 3


@pytest.mark.parametrize("verdicts", [None, "", np.nan, pd.NA])
def test_examples_need_no_threshold(scores: pd.DataFrame, verdicts: object) -> None:
    scores["is_anomalous"] = pd.Series([verdicts] * len(scores), dtype=object)
    chosen = choose_examples(scores, 2)
    assert list(chosen["worst"]["image"]) == ["d0.png", "n0.png"]
    assert list(chosen["best"]["image"]) == ["d8.png", "d7.png"]


def test_examples_survive_a_csv_file(scores: pd.DataFrame) -> None:
    scores["is_anomalous"] = scores["is_anomalous"].astype(object)
    scores.loc[3, "is_anomalous"] = None
    read = pd.read_csv(io.StringIO(scores.to_csv(index=False)))
    assert list(choose_examples(read, 3)["worst"]["image"]) == ["d0.png", "n0.png", "d1.png"]


@given(
    labels=st.lists(st.sampled_from(["normal", "defective"]), max_size=12),
    count=st.integers(1, 4),
    seed=st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_no_image_is_an_example_twice(labels: list[str], count: int, seed: int) -> None:
    values = np.random.default_rng(seed).random(len(labels))
    frame = table(
        image=[f"{k}.png" for k in range(len(labels))],
        label=labels,
        score=list(values),
        is_anomalous=list(values > 0.5),
    )
    chosen = choose_examples(frame, count)
    names = [name for rows in chosen.values() for name in rows["image"]]
    assert len(names) == len(set(names))
    assert all(len(rows) <= count for rows in chosen.values())
    assert (chosen["best"]["label"] == "defective").all()
    assert bool(names) == bool(labels)
    assert all(list(rows.columns) == list(frame.columns) for rows in chosen.values())


def test_examples_name_a_missing_column() -> None:
    with pytest.raises(AlmrrError, match="score"):
        choose_examples(table(image=["a"], label=["normal"]), 1)


@pytest.mark.parametrize(
    ("label", "verdict", "word"),
    [
        ("defective", True, "found"),
        ("defective", False, "missed"),
        ("normal", "True", "false positive"),
        ("normal", "False", "passed"),
    ],
)
def test_caption_says_what_became_of_the_image(label: str, verdict: object, word: str) -> None:
    row = pd.Series(
        {
            "image": "a/b/x.png",
            "label": label,
            "defect_type": "hole",
            "score": 0.25,
            "is_anomalous": verdict,
        }
    )
    assert caption_example(row) == f"x.png · hole · score 0.250 · {word}"


def test_caption_leaves_out_what_is_unknown() -> None:
    row = pd.Series(
        {
            "image": "x.png",
            "label": "defective",
            "score": 0.25,
            "is_anomalous": np.nan,
            "pixel_ap": 0.5,
        }
    )
    assert caption_example(row) == "x.png · defective · score 0.250 · pixel AP 0.50"


def test_examples_are_drawn_written_and_read(scores: pd.DataFrame, tmp_path: Path) -> None:
    asked = []

    def load(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        asked.append(name)
        return (
            np.zeros((32, 32, 3), np.uint8),
            np.zeros((32, 32), bool),
            np.zeros((32, 32), np.float32),
        )

    drawn = list(draw_examples(scores, count=2, load=load, threshold=0.5))
    _write(pack_examples(drawn), tmp_path)
    read = read_examples(tmp_path)
    assert asked == ["d8.png", "d7.png", "d4.png", "n2.png", "d0.png", "n0.png"]
    assert [(o.kind, o.caption) for o in read] == [(o.kind, o.caption) for o in drawn]
    assert [o.image for o in read] == [o.image for o in drawn]
    assert all(Image.open(io.BytesIO(o.image)).format == "WEBP" for o in read)


def test_no_examples_are_written_and_read_too(tmp_path: Path) -> None:
    _write(pack_examples([]), tmp_path)
    assert read_examples(tmp_path) == []


def test_reading_names_what_is_missing_or_unknown(tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match=r"examples\.csv"):
        read_examples(tmp_path)
    _write(pack_examples([Overlay("best", "x", b"")]), tmp_path)
    index = tmp_path / "examples.csv"
    index.write_text(index.read_text().replace("best,", "funny,"))
    with pytest.raises(AlmrrError, match="funny"):
        read_examples(tmp_path)
