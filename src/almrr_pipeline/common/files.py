"""Writing to disk so that what goes wrong is said in one sentence, and nothing half-done remains."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import IMAGE_SUFFIXES
from almrr_pipeline.common.progress import track

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_BLOCK = 1 << 20


class DiskError(AlmrrError):
    """The disk is full or may not be written: no other address would help."""


@contextmanager
def report_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a folder that may not be written into a sentence; `path` is what is being written.

    Raises:
        DiskError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskError(f"The disk is full: {path} could not be written. Free some space and run again.") from error
        if error.errno in _FORBIDDEN:
            raise DiskError(
                f"{path} may not be written ({error.strerror}); change its permissions or work in another folder."
            ) from error
        raise


def list_images(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Return the images directly in `folder`, sorted by name; hidden files (._copy.png) are none."""
    wanted = {suffix.lower() for suffix in suffixes}
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in wanted and not path.name.startswith(".") and path.is_file()
    )


def list_folders(folder: Path) -> list[Path]:
    """Return the folders directly in `folder`, sorted by name, hidden ones left out."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_folder(root: Path, *children: str, name: str | None = None, depth: int = 3) -> Path | None:
    """Find the folder that holds all `children`, at most `depth` levels below `root`, the highest one first.

    Archives wrap their data in folders of changing names; what lies inside is what counts.
    With `name`, a folder of that name goes before any other on its level, and below `root` no other is taken.
    """
    level = [root]
    for below in range(depth + 1):
        for folder in level:
            named = name is None or below == 0 or folder.name == name
            if named and all((folder / child).is_dir() for child in children):
                return folder
        level = [child for folder in level for child in list_folders(folder)]
    return None


def transfer(parts: Iterable[Path], target: Path, *, move: bool) -> None:
    """Bring files and folders into `target` under their own names.

    They are moved when they lie in a folder of ours that is thrown away, else copied: never linked, because DVC takes
    hold of what lies in data/. Links are followed; permissions are not copied, so that a read-only mirror does not end
    as a data folder that nobody can delete.

    Raises:
        DiskError: the disk is full, or the target may not be written.
    """
    with report_disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        if move:
            for part in parts:
                shutil.move(part, target / part.name)
        else:
            _copy(list(parts), target)


def _copy(parts: list[Path], target: Path) -> None:
    files = [(path, target / path.relative_to(part.parent)) for part in parts for path in _files_below(part)]
    with track(len(files), unit="files", description=f"copy to {target.name}") as advance:
        for path, copy in files:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            advance(1)


def _files_below(part: Path) -> list[Path]:
    if part.is_file():
        return [part]
    return sorted(path for path in part.rglob("*") if path.is_file() and not path.name.startswith("."))


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours with all that lies in it; what cannot be removed is logged, not raised."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%s could not be removed", folder)


def empty_folder(folder: Path) -> None:
    """Remove what lies in `folder`, but not the folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hexadecimal digits; reads in blocks, so any size will do."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as stream, track(size, unit="B", description=f"checksum of {path.name}") as advance:
        while block := stream.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()
