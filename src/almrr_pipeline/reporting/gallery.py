"""The gallery of every test image: small images and maps, outlines, and what a page says of them.

`build_gallery` makes what the evaluation stores, within a budget of bytes, and `show_gallery` what
the page shows. The script of the page decodes the maps and draws the outlines of other thresholds.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from almrr_pipeline.common.arrays import AnomalyMap, ImageArray
from almrr_pipeline.reporting.examples import Result, caption_example, name_outcome

Gallery = dict[str, Any]
"""Ready for JSON: threshold, scale (of the maps' value 255), items in the test set's order."""

CATEGORY_BYTES = 1_500_000
"""Budget of one category and seed, before base64 adds a third: five make a page below 15 MB."""
PAGE_BYTES = 11_000_000
"""Budget of all galleries of a page, in base64; what is beyond is named and left out."""
_IMAGE_BYTES = 24_000  # no image needs more, however few there are
_EDGES = (256, 224, 192, 160, 128, 96)  # of the longer side, in pixels: the first that fits, or 96
_MAP_EDGE = 128  # anomaly maps are smooth


def build_gallery(
    images: Iterable[str], load: Callable[[str], Result], *, largest: float, threshold: float | None
) -> Gallery:
    """Reduce every image and map to its share of the budget, and trace both outlines.

    Args:
        images: names that `load` is called with, one at a time.
        load: gives the image, its ground truth if there is one, and its anomaly map.
        largest: largest value of all maps: 255 of the 8-bit maps.
        threshold: of pixels; None traces the ground truth alone.

    Returns:
        The content of gallery.json. Outlines are SVG paths in the pixels of the reduced image.
    """
    names = list(images)
    budget = min(_IMAGE_BYTES, CATEGORY_BYTES // max(1, len(names)))
    items = [_reduce(*load(name), largest, threshold, budget) | {"image": name} for name in names]
    return {"threshold": threshold, "scale": largest, "items": items}


def show_gallery(gallery: Gallery, scores: pd.DataFrame, threshold: float | None) -> dict[str, Any]:
    """Join images and scores for the template: tiles by falling score, and what they can be.

    Args:
        gallery: as `build_gallery` returns it.
        scores: a row per image, as `evaluation.maps.tabulate_scores` gives them.
        threshold: of the image scores; None where there is none.
    """
    items = {item["image"]: item for item in gallery["items"]}
    rows = scores[scores["image"].isin(items)]
    rows = rows.sort_values(["score", "image"], ascending=[False, True], kind="stable")
    tiles = [
        items[row["image"]]
        | {
            "score": float(row["score"]),
            "label": row["label"],
            "defect_type": str(row.get("defect_type", row["label"])),
            "outcome": name_outcome(row),
            "caption": caption_example(row),
        }
        for _, row in rows.iterrows()
    ]
    edges = [max(tile["size"]) for tile in tiles]
    return {
        "tiles": tiles,
        "types": list(dict.fromkeys(sorted(tile["defect_type"] for tile in tiles))),
        "edges": (min(edges, default=0), max(edges, default=0)),
        "scale": gallery["scale"],
        "pixel_threshold": gallery["threshold"],
        "image_threshold": threshold,
        "highest_score": max((tile["score"] for tile in tiles), default=1.0),
    }


def weigh(gallery: Gallery) -> int:
    """Return the bytes that a gallery takes on the page."""
    parts = ("photo", "map", "truth", "found")
    return sum(len(item[part]) for item in gallery["items"] for part in parts)


def trace_outlines(values: npt.NDArray[Any], level: float, size: tuple[int, int]) -> str:
    """Trace where `values`, shape (H, W), cross a level above 0, as an SVG path.

    Lines end at the border of the drawing, whose size is (width, height); empty without a crossing.
    """
    from skimage.measure import approximate_polygon, find_contours  # slow to import

    rows, columns = values.shape
    scale, ends = np.array([size[1] / rows, size[0] / columns]), np.array(size[::-1])
    path = ""
    for contour in find_contours(np.pad(values.astype(np.float32), 1), max(level, 1e-9)):  # type: ignore[no-untyped-call]
        points = np.clip((contour - 0.5) * scale, 0, ends)  # of a pixel's center: index + 0.5
        corners = approximate_polygon(points, tolerance=0.4)[:, ::-1]  # type: ignore[no-untyped-call]
        path += "M" + " ".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    return path.replace(".0", "")


def _reduce(
    image: ImageArray,
    mask: npt.NDArray[np.bool_] | None,
    anomaly_map: AnomalyMap,
    largest: float,
    threshold: float | None,
    budget: int,
) -> dict[str, Any]:
    """Encode an image and its map at the first edge whose bytes fit the budget, or the last."""
    gray = np.rint(np.clip(anomaly_map / max(largest, 1e-9), 0.0, 1.0) * 255).astype(np.uint8)
    for edge in _EDGES:
        photo = _shrink(Image.fromarray(image), edge)
        content = (
            _encode(photo, 72),
            _encode(_shrink(Image.fromarray(gray), min(edge, _MAP_EDGE)), 90),
        )
        if sum(map(len, content)) <= budget:
            break
    photo_address, map_address = (
        f"data:image/webp;base64,{base64.b64encode(part).decode('ascii')}" for part in content
    )
    size = photo.size
    return {
        "size": list(size),
        "photo": photo_address,
        "map": map_address,
        "truth": "" if mask is None else trace_outlines(mask, 0.5, size),
        "found": "" if threshold is None else trace_outlines(anomaly_map, threshold, size),
    }


def _shrink(image: Image.Image, edge: int) -> Image.Image:
    smaller = image.copy()
    smaller.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    return smaller


def _encode(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=4)
    return stream.getvalue()


def split_budget(galleries: Mapping[str, Gallery]) -> list[str]:
    """Return the labels of the galleries that the page has room for, in their order."""
    room, chosen = PAGE_BYTES, []
    for label, gallery in galleries.items():
        if (weight := weigh(gallery)) <= room:
            room -= weight
            chosen.append(label)
    return chosen
