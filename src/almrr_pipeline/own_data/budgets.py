"""Sizes of a new surface: those of a budget of conf/budget, at an input that suits its images."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.datasets.account import inspect_folder

FOLDER = Path("conf/budget")
DEFAULT = "laptop"
LEAST_SIDE, STEP = 128, 16
"""Of the network's input, in pixels; its sides are multiples of the step."""
_ENOUGH = 200  # images whose sizes are looked at
_ORIENTATION, _TURNED = 0x0112, {5, 6, 7, 8}  # EXIF: a quarter turn


def read_budget(project: Path, name: str) -> dict[str, Any]:
    """The sections of a budget; AlmrrError if there is none of that name."""
    path = project / FOLDER / f"{name}.yaml"
    if not path.is_file():
        listed = ", ".join(sorted(file.stem for file in (project / FOLDER).glob("*.yaml")))
        raise AlmrrError(f"There is no budget {name}; choose one of {listed}.")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.pop("budget")
    return values


def suit_input(sections: dict[str, Any], folder: Path) -> None:
    """Set data.image_size, in place, to the typical size of a folder's images, as a rule.

    Larger images are scaled down, with their proportions, until the longer side is that of the
    budget. Nothing is changed without a budget's size, or where no image is readable: the check of
    the folder, which follows, says why.
    """
    data = sections.get("data", {})
    if "image_size" not in data or not folder.is_dir():
        return
    sizes = []
    try:
        items = inspect_folder(folder, normal_names=None).items[:_ENOUGH]
    except AlmrrError:
        return
    for item in items:
        with suppress(OSError, UnidentifiedImageError), Image.open(item.image) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            sizes.append(image.size if turned else image.size[::-1])
    if sizes:
        rows, columns = (float(median(sides)) for sides in zip(*sizes, strict=True))
        scale = min(1.0, max(data["image_size"]) / max(rows, columns))
        sides = (round(scale * side / STEP) * STEP for side in (rows, columns))
        data["image_size"] = [max(LEAST_SIDE, side) for side in sides]
