"""specimens.csv: which images show the same specimen, so that none is trained on and tested.

The file is next to the folders of images. Its columns are `image`, a path relative to the file, and
`specimen`, any name. An image that is not listed is a specimen of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from almrr_pipeline.common.errors import AlmrrError

SPECIMENS_FILE = "specimens.csv"
_COLUMNS = ("image", "specimen")


def write_specimens(folder: Path, specimens: Mapping[Path, str]) -> None:
    """Write specimens.csv into `folder`, which contains the images."""
    rows = [(image.relative_to(folder).as_posix(), name) for image, name in specimens.items()]
    pd.DataFrame(rows, columns=list(_COLUMNS)).to_csv(folder / SPECIMENS_FILE, index=False)


def read_specimens(folder: Path) -> dict[Path, str]:
    """Read specimens.csv from `folder`.

    Returns:
        The specimen of each listed image; empty where there is no such file.

    Raises:
        AlmrrError: the file cannot be read or lacks a column; or a line names an absent image, no
            specimen, or another specimen than an earlier line.
    """
    path = folder / SPECIMENS_FILE
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True
        )
    except ValueError as error:  # includes pandas' parser errors and UnicodeDecodeError
        problem = f"cannot be read ({' '.join(str(error).split())})"
        advice = "save it as comma-separated UTF-8 text"
        raise AlmrrError(f"{SPECIMENS_FILE} {problem}; {advice}.") from error
    if not set(_COLUMNS) <= set(table.columns):
        found, needed = ", ".join(map(str, table.columns)), " and ".join(_COLUMNS)
        raise AlmrrError(f"{SPECIMENS_FILE} has the columns {found}; it needs {needed}.")
    specimens: dict[Path, str] = {}
    rows = zip(table["image"], table["specimen"], strict=True)
    for line, (name, specimen) in enumerate(rows, start=2):
        image, problem = folder / name.replace("\\", "/"), ""
        if not image.is_file():
            problem = f"there is no image {name}; paths are relative to {SPECIMENS_FILE}"
        elif not specimen:
            problem = f"{name} has no specimen; name one, or remove the line"
        elif (known := specimens.setdefault(image, specimen)) != specimen:
            problem = f"{name} has two specimens, {known} and {specimen}; keep one"
        if problem:
            raise AlmrrError(f"{SPECIMENS_FILE}, line {line}: {problem}.")
    return specimens
