"""Which images of a test set are shown, and how they lie on disk between drawing and page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.evaluation.maps import AnomalyMap
from almrr_pipeline.common.images import ImageArray, MaskArray
from almrr_pipeline.reporting.overlays import draw_panel, encode_image

ExampleKind = Literal["best", "typical", "worst"]
Result = tuple[ImageArray, MaskArray | None, AnomalyMap]
"""An image, its ground truth if there is one, and its anomaly map."""

_INDEX = "examples.csv"


@dataclass(frozen=True)
class Overlay:
    """A drawn example: what it stands for, the line below it, and the image, a file's path or its content."""

    kind: ExampleKind
    caption: str
    image: Path | bytes


def choose_examples(scores: pd.DataFrame, count: int) -> dict[ExampleKind, pd.DataFrame]:
    """Choose the images that show what the model does well, usually, and badly.

    How clearly a defect was found is its share of defective images with a lower score, averaged with the same share
    for `pixel_ap` where that is known.

    - best: defective images found most clearly.
    - worst: missed defects, least clear first, and false alarms, highest score first, in turn; where there are fewer
      errors than places, the images that came nearest to one.
    - typical: defective images around the median, and one normal image of median score if there is room for two.

    No image is chosen twice; of few images, each kind has its share. Equal images are taken in the order of their
    names, whatever the order of the rows.

    Args:
        scores: a row an image: image, label (normal | defective), score; is_anomalous and pixel_ap may be missing or
            empty. Other columns are kept.
        count: images of each kind.

    Returns:
        Kind to the chosen rows, in the order in which they are to be shown.

    Raises:
        AlmrrError: a column is missing.
    """
    missing = {"image", "label", "score"} - set(scores.columns)
    if missing:
        raise AlmrrError(f"The scores lack the column(s) {', '.join(sorted(missing))}; evaluate the category again.")
    ranked = _rank_images(scores)
    best = ranked[ranked.defective & ~ranked.wrong].sort_values("clarity", ascending=False, kind="stable")
    best = best.head(min(count, _share(int(ranked.defective.sum()))))
    rest = ranked.drop(index=best.index)
    worst = _take_worst(rest, min(count, _share(len(ranked))))
    typical = _take_typical(ranked, best.index.union(worst.index), count)
    chosen: dict[ExampleKind, pd.DataFrame] = {"best": best, "typical": typical, "worst": worst}
    return {kind: rows[list(scores.columns)] for kind, rows in chosen.items()}


def caption_example(row: pd.Series) -> str:
    """Say in one line what an image is and what became of it: file name, defect, score, verdict."""
    defective, verdict = row["label"] == "defective", _read_verdict(row.get("is_anomalous"))
    outcomes = {(True, True): "found", (True, False): "missed", (False, True): "false alarm", (False, False): "passed"}
    parts = [str(row["image"]).rsplit("/", 1)[-1], str(row.get("defect", row["label"])), f"score {row['score']:.3f}"]
    if verdict is not None:
        parts.append(outcomes[defective, verdict])
    localized = row.get("pixel_ap")
    if localized is not None and not pd.isna(localized):
        parts.append(f"pixel AP {localized:.2f}")
    return " · ".join(parts)


def draw_examples(
    scores: pd.DataFrame, *, count: int, load: Callable[[str], Result], threshold: float | None
) -> Iterator[Overlay]:
    """Choose examples and draw them, one at a time.

    Args:
        scores: as `choose_examples` takes them.
        count: images of each kind.
        load: called with a value of the column `image`.
        threshold: pixel threshold of the outlines; None draws none.

    Yields:
        Overlays with WebP content: best, typical, worst.
    """
    for kind, rows in choose_examples(scores, count).items():
        for _, row in rows.iterrows():
            image, mask, anomaly_map = load(row["image"])
            panel = draw_panel(image, mask, anomaly_map, threshold=threshold)
            yield Overlay(kind, caption_example(row), encode_image(panel))


def pack_examples(overlays: Iterable[Overlay]) -> dict[str, bytes]:
    """Content of the files of a folder of drawn examples by name: an image each, and the index `read_examples` reads."""
    files: dict[str, bytes] = {}
    rows = []
    for number, overlay in enumerate(overlays, start=1):
        name = f"{number:02d}_{overlay.kind}.webp"
        files[name] = overlay.image if isinstance(overlay.image, bytes) else overlay.image.read_bytes()
        rows.append({"file": name, "kind": overlay.kind, "caption": overlay.caption})
    index = pd.DataFrame(rows, columns=["file", "kind", "caption"])
    return files | {_INDEX: index.to_csv(index=False, lineterminator="\n").encode()}


def read_examples(folder: Path) -> list[Overlay]:
    """List what `pack_examples` packed; the images stay on disk until they are shown.

    Raises:
        AlmrrError: the index is missing or names an unknown kind.
    """
    if not (folder / _INDEX).is_file():
        raise AlmrrError(f"{folder} holds no {_INDEX}; evaluate the category again.")
    index = pd.read_csv(folder / _INDEX, keep_default_na=False)
    unknown = set(index["kind"]) - set(get_args(ExampleKind))
    if unknown:
        raise AlmrrError(
            f"{folder / _INDEX} names the kind(s) {', '.join(sorted(unknown))}; evaluate the category again."
        )
    rows = zip(index["kind"], index["caption"].astype(str), index["file"].astype(str), strict=True)
    return [Overlay(kind, caption, folder / file) for kind, caption, file in rows]


def _read_verdict(value: object) -> bool | None:
    """A cell of the column is_anomalous: True, False, or None where it is empty."""
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)) or value == "":
        return None
    return value == "True" if isinstance(value, str) else bool(value)


def _share(images: int) -> int:
    """A third of the images, rounded up: what one kind may take when there are few."""
    return -(-images // 3)


def _rank_images(scores: pd.DataFrame) -> pd.DataFrame:
    """Sort by name and add how clearly each defect was found and whether the verdict was wrong."""
    ranked = scores.sort_values("image", kind="stable").reset_index(drop=True)
    ranked["defective"] = ranked["label"] == "defective"
    columns = [name for name in ("score", "pixel_ap") if name in ranked]
    shares = ranked.loc[ranked.defective, columns].astype(float).rank(pct=True, method="min")
    ranked["clarity"] = shares.mean(axis=1)
    verdicts = [_read_verdict(value) for value in ranked.get("is_anomalous", pd.Series([None] * len(ranked)))]
    ranked["wrong"] = [
        verdict is not None and verdict != defective
        for verdict, defective in zip(verdicts, ranked.defective, strict=True)
    ]
    return ranked


def _take_worst(ranked: pd.DataFrame, count: int) -> pd.DataFrame:
    """Errors first, then the nearest to one; defective and normal images in turn within each."""
    defective = ranked[ranked.defective].sort_values("clarity", kind="stable")
    normal = ranked[~ranked.defective].sort_values("score", ascending=False, kind="stable")
    order = pd.concat([side.assign(turn=side.groupby("wrong").cumcount()) for side in (defective, normal)])
    order = order.assign(right=~order["wrong"], normal=~order["defective"])
    return order.sort_values(["right", "turn", "normal"], kind="stable").head(count)


def _take_typical(ranked: pd.DataFrame, taken: pd.Index, count: int) -> pd.DataFrame:
    """Images around the median: defective ones, and a normal one if there is room for two."""
    defective, normal = ranked[ranked.defective], ranked[~ranked.defective]
    normals = count if defective.empty else int(count >= 2 and not normal.empty)
    located = _nearest_median(defective, "clarity", taken, count - normals)
    return pd.concat([located, _nearest_median(normal, "score", taken, normals)])


def _nearest_median(rows: pd.DataFrame, column: str, taken: pd.Index, count: int) -> pd.DataFrame:
    distance = (rows[column] - rows[column].median()).abs().round(9)  # so that a tie is one, rounding errors or not
    distance = distance.drop(index=taken, errors="ignore")
    return rows.loc[distance.sort_values(kind="stable").index[:count]]
