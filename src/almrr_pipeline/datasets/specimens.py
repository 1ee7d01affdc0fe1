"""specimens.csv: which images of a data set show the same piece, so that none of it is trained on and tested.

It lies beside the images' folders and has the columns `image`, a path relative to it, and `part`, any name.
Images that it does not name stand for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from almrr_pipeline.common.errors import AlmrrError

PARTS_FILE = "specimens.csv"
_COLUMNS = ("image", "part")


def write_parts(folder: Path, parts: Mapping[Path, str]) -> None:
    """Write specimens.csv into `folder`; the images lie below it."""
    rows = [(image.relative_to(folder).as_posix(), part) for image, part in parts.items()]
    pd.DataFrame(rows, columns=list(_COLUMNS)).to_csv(folder / PARTS_FILE, index=False)


def read_parts(folder: Path) -> dict[Path, str]:
    """Read specimens.csv from `folder`.

    Returns:
        The part of each image that is named; nothing where there is no such file.

    Raises:
        AlmrrError: the file is no such table; or a line, which is named, has an image that is not there, no part, or
            another part than a line before gave the same image.
    """
    path = folder / PARTS_FILE
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except ValueError as error:  # pandas' parser errors and UnicodeDecodeError are such
        reason = " ".join(str(error).split())
        raise AlmrrError(
            f"{PARTS_FILE} cannot be read ({reason}); save it as comma-separated text in UTF-8."
        ) from error
    if not set(_COLUMNS) <= set(table.columns):
        raise AlmrrError(
            f"{PARTS_FILE} has the columns {', '.join(map(str, table.columns))}; it needs {' and '.join(_COLUMNS)}."
        )
    parts: dict[Path, str] = {}
    for line, (name, part) in enumerate(zip(table["image"], table["part"], strict=True), start=2):
        image = folder / name.replace("\\", "/")
        if not image.is_file():
            raise AlmrrError(f"{PARTS_FILE}, line {line}: there is no image {name}; paths are relative to that file.")
        if not part:
            raise AlmrrError(f"{PARTS_FILE}, line {line}: {name} has no part; name one, or remove the line.")
        if (known := parts.setdefault(image, part)) != part:
            raise AlmrrError(f"{PARTS_FILE}, line {line}: {name} is of two parts, {known} and {part}; keep one.")
    return parts
