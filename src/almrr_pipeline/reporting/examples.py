"""Choice of the test images that the report shows, and their files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from almrr_pipeline.common.arrays import AnomalyMap, ImageArray, MaskArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.reporting.overlays import draw_panel, encode_image

ExampleKind = Literal["best", "typical", "worst"]
Result = tuple[ImageArray, MaskArray | None, AnomalyMap]
"""An image, its ground truth if there is one, and its anomaly map."""

_INDEX = "examples.csv"
_VERDICTS: dict[object, bool] = {True: True, "True": True, False: False, "False": False}
"""What a cell of the column is_anomalous may hold, also of a CSV file; others are no verdict."""


@dataclass(frozen=True)
class Overlay:
    """A drawn example: its kind, its caption, and the content of the image file."""

    kind: ExampleKind
    caption: str
    image: bytes


def choose_examples(scores: pd.DataFrame, count: int) -> dict[ExampleKind, pd.DataFrame]:
    """Choose the images that the model does best, typically, and worst on.

    How clearly a defect was found is its percentile rank among defective images by score, averaged
    with that by `pixel_ap` where this is known.

    - best: defective images found most clearly.
    - worst: missed defects, least clear first, and false positives, highest score first, in turn;
      where there are fewer errors than places, the images that came nearest to one.
    - typical: defective images around the median, and one normal image of median score if there is
      room for two.

    No image is chosen twice; of few images, each kind gets at most a third. Ties are broken by the
    images' names, so the order of the rows does not matter.

    Args:
        scores: a row per image: image, label (normal | defective), score; is_anomalous and pixel_ap
            may be missing or empty. Other columns are kept.
        count: images of each kind.

    Returns:
        The chosen rows by kind, in the order in which they are to be shown. A missing column is an
        AlmrrError.
    """
    missing = sorted({"image", "label", "score"} - set(scores.columns))
    if missing:
        raise AlmrrError(
            f"The scores lack the column(s) {', '.join(missing)}; evaluate the category again."
        )
    ranked = _rank_images(scores)
    best = ranked[ranked.defective & ~ranked.wrong]
    best = best.sort_values("clarity", ascending=False, kind="stable")
    best = best.head(min(count, math.ceil(ranked.defective.sum() / 3)))
    worst = _take_worst(ranked.drop(index=best.index), min(count, math.ceil(len(ranked) / 3)))
    typical = _take_typical(ranked, best.index.union(worst.index), count)
    columns = list(scores.columns)
    return {"best": best[columns], "typical": typical[columns], "worst": worst[columns]}


def caption_example(row: pd.Series) -> str:
    """Return the caption of an image: file name, defect type, score, outcome, pixel AP."""
    words = [str(row["image"]).rsplit("/", 1)[-1], str(row.get("defect_type", row["label"]))]
    words.append(f"score {row['score']:.3f}")
    if outcome := name_outcome(row):
        words.append(outcome)
    if not pd.isna(row.get("pixel_ap")):
        words.append(f"pixel AP {row['pixel_ap']:.2f}")
    return " · ".join(words)


def name_outcome(row: pd.Series) -> str:
    """Return found, missed, passed or false positive; empty where there is no verdict."""
    verdict = _VERDICTS.get(row.get("is_anomalous"))
    outcomes = {True: ("false positive", "found"), False: ("passed", "missed")}
    return "" if verdict is None else outcomes[verdict][row["label"] == "defective"]


def draw_examples(
    scores: pd.DataFrame, *, count: int, load: Callable[[str], Result], threshold: float | None
) -> Iterator[Overlay]:
    """Choose `count` images of each kind, as `choose_examples` does, and draw them one at a time.

    `load` is called with a value of the column `image`; the outlines are those of the pixel
    threshold, if there is one. The overlays are WebP: best, typical, worst.
    """
    for kind, rows in choose_examples(scores, count).items():
        for _, row in rows.iterrows():
            panel = draw_panel(*load(row["image"]), threshold=threshold)
            yield Overlay(kind, caption_example(row), encode_image(panel))


def pack_examples(overlays: Iterable[Overlay]) -> dict[str, bytes]:
    """Return files by name: an image per overlay, and the index that `read_examples` reads."""
    named = {f"{k:02d}_{overlay.kind}.webp": overlay for k, overlay in enumerate(overlays, start=1)}
    rows = [(name, overlay.kind, overlay.caption) for name, overlay in named.items()]
    index = pd.DataFrame(rows, columns=["file", "kind", "caption"])
    files = {name: overlay.image for name, overlay in named.items()}
    return files | {_INDEX: index.to_csv(index=False, lineterminator="\n").encode()}


def read_examples(folder: Path) -> list[Overlay]:
    """Read the files of `pack_examples`; AlmrrError without an index or for an unknown kind."""
    if not (folder / _INDEX).is_file():
        raise AlmrrError(f"There is no {_INDEX} in {folder}; evaluate the category again.")
    index = pd.read_csv(folder / _INDEX, keep_default_na=False, dtype=str)
    unknown = ", ".join(sorted(set(index["kind"]) - set(get_args(ExampleKind))))
    if unknown:
        raise AlmrrError(
            f"{folder / _INDEX} has the unknown kind(s) {unknown}; evaluate the category again."
        )
    rows = zip(index["kind"], index["caption"], index["file"], strict=True)
    return [Overlay(kind, caption, (folder / file).read_bytes()) for kind, caption, file in rows]


def _rank_images(scores: pd.DataFrame) -> pd.DataFrame:
    """Sort by name; add how clearly each defect was found and whether the verdict was wrong."""
    ranked = scores.sort_values("image", kind="stable").reset_index(drop=True)
    ranked["defective"] = ranked["label"] == "defective"
    columns = [name for name in ("score", "pixel_ap") if name in ranked]
    ranks = ranked.loc[ranked.defective, columns].astype(float).rank(pct=True, method="min")
    ranked["clarity"] = ranks.mean(axis=1)
    verdicts = ranked.get("is_anomalous", [None] * len(ranked))
    ranked["wrong"] = [
        _VERDICTS.get(verdict, defective) != defective
        for verdict, defective in zip(verdicts, ranked.defective, strict=True)
    ]
    return ranked


def _take_worst(ranked: pd.DataFrame, count: int) -> pd.DataFrame:
    """Errors first, then the nearest to one; defective and normal images in turn within each."""
    defective = ranked[ranked.defective].sort_values("clarity", kind="stable")
    normal = ranked[~ranked.defective].sort_values("score", ascending=False, kind="stable")
    order = pd.concat([defective, normal])
    order["place"] = order.groupby(["defective", "wrong"]).cumcount()
    order = order.sort_values(["wrong", "place", "defective"], ascending=[False, True, False])
    return order.head(count)


def _take_typical(ranked: pd.DataFrame, taken: pd.Index, count: int) -> pd.DataFrame:
    """Images around the median: defective ones, and a normal one if there is room for two."""
    defective, normal = ranked[ranked.defective], ranked[~ranked.defective]
    normals = count if defective.empty else int(count >= 2 and not normal.empty)
    located = _nearest_median(defective, "clarity", taken, count - normals)
    return pd.concat([located, _nearest_median(normal, "score", taken, normals)])


def _nearest_median(rows: pd.DataFrame, column: str, taken: pd.Index, count: int) -> pd.DataFrame:
    distance = (rows[column] - rows[column].median()).abs()
    distance = distance.round(9).drop(index=taken, errors="ignore")  # rounding errors end no tie
    return rows.loc[distance.sort_values(kind="stable").index[:count]]
