"""Sizes of a new surface: those of a budget of conf/budget, at an input that suits its images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from almrr_pipeline.common.errors import AlmrrError

FOLDER = Path("conf/budget")
DEFAULT = "laptop"
LEAST_SIDE, STEP = 128, 16
"""Of the network's input, in pixels; its sides are multiples of the step."""


def read_budget(project: Path, name: str) -> dict[str, Any]:
    """The sections of a budget; AlmrrError if there is none of that name."""
    path = project / FOLDER / f"{name}.yaml"
    if not path.is_file():
        listed = ", ".join(sorted(file.stem for file in (project / FOLDER).glob("*.yaml")))
        raise AlmrrError(f"There is no budget {name}; choose one of {listed}.")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.pop("budget")
    return values


def suit_input(sizes: Iterable[tuple[int, int]], *, largest: int) -> list[int]:
    """Rows and columns of the input for images of these (rows, columns), as a rule their own.

    Larger images are scaled down, with their proportions, until the longer side is `largest`.
    """
    rows, columns = (float(median(sides)) for sides in zip(*sizes, strict=True))
    scale = min(1.0, largest / max(rows, columns))
    return [max(LEAST_SIDE, round(scale * side / STEP) * STEP) for side in (rows, columns)]
