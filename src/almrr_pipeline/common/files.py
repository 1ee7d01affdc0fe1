"""Atomic writing, moving, copying and hashing of files and folders, with clear disk errors."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from almrr_pipeline.common.errors import AlmrrError, DiskError
from almrr_pipeline.common.progress import track

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's words, without a number
_BLOCK = 1 << 20
_TRIED = 4096  # bytes; a block of most file systems
STAGING_PREFIX = ".staging@"
"""How the names of staging folders begin, those of killed processes included."""
_PARTIAL = ".partial@"
"""In the names of unfinished files, before their writer's machine and process."""
_HASHED_WITHOUT_PROGRESS = 100_000_000  # bytes that are hashed in less than a second


@contextmanager
def report_disk_errors(path: Path, *, only_full: bool = False) -> Iterator[None]:
    """Raise DiskError instead of the OSError of a full disk or of a missing permission.

    `path` is what is being written; the message names it. With `only_full`, for code that reads
    too, missing permissions are left alone.
    """
    try:
        yield
    except OSError as error:
        if (message := explain_disk_error(error, path, only_full=only_full)) is None:
            raise
        raise DiskError(message) from error


def explain_disk_error(error: OSError, path: Path, *, only_full: bool = False) -> str | None:
    """A sentence for a full disk, or a missing permission to write `path`; None for others."""
    if error.errno in _FULL or _SHORT_WRITE.fullmatch(str(error)):
        return f"The disk is full: {path} could not be written. Free some space and run again."
    if error.errno in _FORBIDDEN and not only_full:
        advice = "change its permissions or work in another folder"
        return f"{path} cannot be written ({error.strerror}); {advice}."
    return None


def check_writable(folder: Path) -> None:
    """Try to write into a folder, or into the nearest one above it that exists.

    For targets of long work; DiskError if not even a block can be written there.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with report_disk_errors(folder), tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_TRIED))
            file.flush()
    except DiskError:
        raise
    except OSError as error:
        advice = "name another folder"
        raise DiskError(f"{folder} cannot be written ({error.strerror}); {advice}.") from error


def check_target_file(path: Path) -> None:
    """Refuse, before long work, a path where no file can be written; AlmrrError, DiskError.

    So are devices, which a finished file would replace, and names that are not UTF-8, which writers
    in C++ end the process for.
    """
    if not path.parent.is_dir():
        raise AlmrrError(
            f"There is no folder {path.parent} to write {path.name} to; make it first."
        )
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device"
        raise AlmrrError(f"{path} is a {kind}; name a file.")
    if escape_name(path).encode() != os.fsencode(path.as_posix()):
        raise AlmrrError(f"{escape_name(path)} is not UTF-8 text; name another file.")
    check_writable(path.parent)


def escape_name(path: Path) -> str:
    r"""Path with forward slashes, as UTF-8 text: other bytes of a name become `\xff`."""
    return escape_text(path.as_posix())


def escape_text(text: str) -> str:
    r"""Text that may name files, as UTF-8 text, see `escape_name`."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Write a file all or nothing, also if the machine loses power; may raise DiskError.

    Yields:
        A temporary path in the same folder, with the same suffix, to write to. It replaces `path`
        when the block ends, and is removed when the block raises. What killed processes of this
        machine have left in that folder is removed too.
    """
    mine = _own_mark(_PARTIAL)
    partial = path.with_name(f".{path.stem}{mine}{os.getpid()}{path.suffix}")
    with report_disk_errors(path):
        for leftover in _list_leftovers(path.parent, mine):
            leftover.unlink(missing_ok=True)
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """Make an empty folder in `parent`, which is created; removed only if the block raises.

    What killed processes of this machine have left there is removed first. May raise DiskError.
    """
    mine = _own_mark(STAGING_PREFIX)
    with report_disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in _list_leftovers(parent, mine):
            remove_folder(leftover)
        made = tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}@", dir=parent)
        folder = parent / Path(made).name  # `made` is absolute from Python 3.12 on
        folder.chmod(0o755)  # mkdtemp's 0o700 would lock out others on a shared disk
    try:
        with report_disk_errors(folder, only_full=True):
            yield folder
    except BaseException:
        remove_folder(folder)
        raise


def _own_mark(kind: str) -> str:
    """What names of this machine's unfinished work hold before the number of its process."""
    return f"{kind}{socket.gethostname()}@"  # "@" is in no host name


def _list_leftovers(folder: Path, mark: str) -> Iterator[Path]:
    """What killed processes of this machine have left in a folder under names with this mark."""
    for path in folder.glob(f"*{mark}*"):
        writer = re.match(r"\d+", path.name.partition(mark)[2])
        if writer and not is_running(int(writer[0])):
            yield path


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        if os.name == "posix":  # elsewhere signal 0 would end the process
            os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # EPERM: it is another user's
    return True


def move_folder_into_place(staged: Path, target: Path) -> None:
    """Move a complete folder to `target`, replacing an older one; may raise DiskError.

    From another disk it is first copied next to the target, so that the target is complete or
    absent at any time. What a killed copy has left is removed.
    """
    partial = target.with_name(f".{target.name}.partial")
    with report_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_folder(partial)
        if staged.stat().st_dev != target.parent.stat().st_dev:
            try:
                shutil.copytree(staged, partial, copy_function=shutil.copyfile)
            except BaseException:
                remove_folder(partial)
                raise
            remove_folder(staged)
            staged = partial
        if target.exists():
            shutil.rmtree(target)
        staged.rename(target)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits; large files show progress."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= _HASHED_WITHOUT_PROGRESS:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        with track(size, unit="B", description=f"checksum of {path.name}") as advance:
            while block := stream.read(_BLOCK):
                digest.update(block)
                advance(len(block))
    return digest.hexdigest()


_SYSTEM_FOLDERS = frozenset(
    {"@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "lost+found"}
)
"""Of network storage and operating systems, in lower case; some hold thumbnails of the images."""


class Entry(NamedTuple):
    """A file found by `walk`, or what it does not follow, with the reason."""

    path: Path
    skipped: str = ""
    is_loss: bool = False  # what is skipped may be images that someone means to use


def walk(folder: Path, *, recursive: bool = True) -> Iterator[Entry]:
    """List the files below a folder, by name; links are followed.

    Hidden files, system folders, links that lead back to a folder around them, links to nothing and
    devices are given with `skipped`, the reason. AlmrrError if a folder cannot be read.
    """
    yield from _walk(folder, recursive, (Path(os.path.realpath(folder)),))


def _walk(folder: Path, recursive: bool, around: tuple[Path, ...]) -> Iterator[Entry]:
    for path, is_folder, is_file in _entries(folder):
        if path.name.startswith("."):
            yield Entry(path, "hidden")
        elif is_folder:
            real = Path(os.path.realpath(path))
            if path.name.lower() in _SYSTEM_FOLDERS:
                yield Entry(path, "a folder of the system, not of images")
            elif any(each.is_relative_to(real) for each in around):
                yield Entry(path, "a link that leads back to a folder around it")
            elif recursive:
                yield from _walk(path, recursive, (*around, real))
        elif is_file:
            yield Entry(path)
        elif path.is_symlink():
            yield Entry(path, "a link to nothing", is_loss=True)
        else:
            yield Entry(path, "neither a file nor a folder")


def _entries(folder: Path) -> list[tuple[Path, bool, bool]]:
    """Return what is in a folder, by name, and whether it is a folder or a file."""
    try:
        return [(path, path.is_dir(), path.is_file()) for path in sorted(folder.iterdir())]
    except OSError as error:
        advice = "change its permissions"
        raise AlmrrError(f"{folder} cannot be read ({error.strerror}); {advice}.") from error


def list_folders(folder: Path) -> list[Path]:
    """Return the folders directly in `folder`, by name, without hidden ones and the system's."""
    if not folder.is_dir():
        return []
    folders = [path for path, is_folder, _ in _entries(folder) if is_folder]
    skipped = _SYSTEM_FOLDERS
    return [p for p in folders if not p.name.startswith(".") and p.name.lower() not in skipped]


def find_folder(root: Path, *children: str, name: str | None = None, depth: int = 3) -> Path | None:
    """Find the folder that contains all `children`, at most `depth` levels below `root`.

    Archives wrap their data in folders of changing names. The highest folder is taken; with
    `name`, only `root` and folders of that name are considered.
    """
    level = [root]
    for below in range(depth + 1):
        for folder in level:
            named = not name or below == 0 or folder.name == name
            if named and all((folder / child).is_dir() for child in children):
                return folder
        level = [child for folder in level for child in list_folders(folder)]
    return None


def transfer(paths: list[Path], target: Path, *, move: bool) -> None:
    """Move or copy files and folders into `target` under their own names; may raise DiskError.

    Copies are never links, because DVC takes hold of the files in data/. Permissions are not
    copied, so that data from a read-only mirror can be deleted later.
    """
    with report_disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        if move:
            for path in paths:
                shutil.move(path, target / path.name)
            return
        files = [
            (file, target / file.relative_to(path.parent))
            for path in paths
            for file in ([path] if path.is_file() else _files_below(path))
        ]
        with track(len(files), unit="files", description=f"copy to {target.name}") as advance:
            for file, copy in files:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
                advance(1)


def _files_below(folder: Path) -> list[Path]:
    return [entry.path for entry in walk(folder) if not entry.skipped]


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it exists, with its contents; a failure is logged, not raised."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%s could not be removed", folder)


def empty_folder(folder: Path) -> None:
    """Remove the contents of `folder`, but not the folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink()
