"""specimens.csv: which images show the same specimen, so that none is trained on and tested.

It is next to the folders of images; its columns are `image`, a path relative to the file, and
`specimen`, any name. An image that is not listed is a specimen of its own.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.datasets.folder_names import normalize

SPECIMENS_FILE = "specimens.csv"
_COLUMNS = ("image", "specimen")


def write_specimens(folder: Path, specimens: Mapping[Path, str]) -> None:
    """Write specimens.csv into `folder`, which contains the images."""
    rows = [(image.relative_to(folder).as_posix(), name) for image, name in specimens.items()]
    pd.DataFrame(rows, columns=list(_COLUMNS)).to_csv(folder / SPECIMENS_FILE, index=False)


def read_specimens(folder: Path, images: Iterable[Path]) -> dict[Path, str]:
    """Read specimens.csv from `folder`, which contains `images`.

    Names are compared composed (NFC); empty lines and empty last fields are left out.

    Returns:
        The specimen of each listed image; empty where there is no such file.

    Raises:
        AlmrrError: the file cannot be read or lacks a column; or a line names none of the images,
            no specimen, or another specimen than an earlier line.
    """
    path = folder / SPECIMENS_FILE
    if not path.is_file():
        return {}
    by_name = {normalize(image.relative_to(folder).as_posix()): image for image in images}
    specimens: dict[Path, str] = {}
    for line, name, specimen in _read_rows(path):
        image = by_name.get(normalize(posixpath.normpath(name.replace("\\", "/"))))
        problem = ""
        if image is None:
            problem = f"there is no image {name}; paths are relative to {SPECIMENS_FILE}"
        elif not specimen:
            problem = f"{name} has no specimen; name one, or remove the line"
        elif (known := specimens.setdefault(image, specimen)) != specimen:
            problem = f"{name} has two specimens, {known} and {specimen}; keep one"
        if problem:
            raise AlmrrError(f"{SPECIMENS_FILE}, line {line}: {problem}.")
    return specimens


def _read_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Read line number, image and specimen of each line that is not empty."""
    advice = "save it as comma-separated UTF-8 text"
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        rows = [(reader.line_num, [field.strip() for field in row]) for row in reader]
    except (ValueError, csv.Error, OSError) as error:
        problem = f"cannot be read ({' '.join(str(error).split())})"
        raise AlmrrError(f"{SPECIMENS_FILE} {problem}; {advice}.") from error
    rows = [(line, row) for line, row in rows if any(row)]
    if not rows:
        raise AlmrrError(f"{SPECIMENS_FILE} cannot be read (it is empty); {advice}.")
    header = [field.casefold() for field in rows[0][1]]
    if not set(_COLUMNS) <= set(header):
        found, needed = ", ".join(filter(None, rows[0][1])), " and ".join(_COLUMNS)
        wanted = f"it needs {needed}, with commas"
        raise AlmrrError(f"{SPECIMENS_FILE} has the columns {found}; {wanted}.")
    for line, row in rows[1:]:
        if any(row[len(header) :]):
            problem = f"cannot be read (line {line} has {len(row)} fields, not {len(header)})"
            raise AlmrrError(f"{SPECIMENS_FILE} {problem}; {advice}.")
        fields = dict(zip(header, row, strict=False))
        yield line, fields.get("image", ""), fields.get("specimen", "")
