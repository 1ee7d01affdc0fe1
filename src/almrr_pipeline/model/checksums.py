"""model.sha256: checksums of a model folder's files, written with them and checked at each load."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import hash_file, write_atomically

logger = logging.getLogger(__name__)

MANIFEST_FILE = "model.sha256"
"""As `sha256sum --check` takes it."""
_LARGEST_FILE = 1_000_000  # bytes of a file of settings


def write_checksums(folder: Path, *names: str) -> None:
    """Note the checksums of these files in the folder's model.sha256; those of others stay."""
    known = _read_checksums(folder) or {}
    known.update({name: hash_file(folder / name) for name in names})
    lines = [f"{checksum}  {name}\n" for name, checksum in sorted(known.items())]
    with write_atomically(folder / MANIFEST_FILE) as path:
        path.write_text("".join(lines), encoding="ascii")


def has_checksums(folder: Path) -> bool:
    """Whether the folder has a model.sha256; those of older versions have none."""
    return (folder / MANIFEST_FILE).is_file()


def check_files(folder: Path, *names: str, optional: bool = False) -> None:
    """Compare files with the folder's model.sha256; a folder without one is one warning.

    Args:
        folder: of a model.
        names: of its files.
        optional: whether a file may be missing in the list.

    Raises:
        AlmrrError: a file is not the one that was written, or the list cannot be read.
    """
    known = _read_checksums(folder)
    if known is None:
        if not optional:
            line = "%s has no %s, as models of older versions: its files are taken unchecked."
            logger.warning(line, folder, MANIFEST_FILE)
        return
    for name in names:
        if name not in known and not optional:
            raise AlmrrError(
                f"{folder / MANIFEST_FILE} does not list {name}; copy the model again."
            )
        if name in known and hash_file(folder / name) != known[name]:
            advice = f"; if you changed it yourself, remove its line from {MANIFEST_FILE}"
            raise AlmrrError(
                f"{folder / name} is not the file that was written with the model (its checksum "
                f"differs); copy or train the model again{advice if optional else ''}."
            )


def _read_checksums(folder: Path) -> dict[str, str] | None:
    path = folder / MANIFEST_FILE
    if not has_checksums(folder):
        return None
    text = path.read_bytes()[:_LARGEST_FILE].decode("ascii", "replace")
    lines = [re.fullmatch(r"([0-9a-f]{64})  ([\w.]+)", line) for line in text.splitlines()]
    if not lines or not all(lines):
        raise AlmrrError(f"{path} is damaged: it holds no checksums; copy the model again.")
    return {line[2]: line[1] for line in lines if line}


def read_settings(path: Path) -> bytes:
    """Read a file of settings; AlmrrError if it is larger than any, OSError if it is not there."""
    if path.stat().st_size > _LARGEST_FILE:
        raise AlmrrError(f"{path} is larger than any model's settings; copy the model again.")
    return path.read_bytes()
