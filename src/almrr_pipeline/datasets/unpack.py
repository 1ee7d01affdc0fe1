"""Unpack archives that nobody has to trust: plain files and folders alone, none outside, no bombs, all or nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Literal, cast

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.progress import format_amount, track
from almrr_pipeline.common.files import remove_folder, report_disk_errors

_BLOCK = 1 << 20
_TAR_BLOCK = 512
_COMPRESSIONS = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\x00": lzma.LZMAFile}
"""How a compressed file begins, and what reads it."""
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,  # an encrypted member, or (NotImplementedError) a compression that this Python does not know
    ValueError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class Limits:
    """What an archive may become. The largest real one, MVTec AD, has about 7000 files and 5 GiB."""

    files: int = 100_000
    size: int = 32 << 30
    """Bytes in all."""
    ratio: float = 100.0
    """Bytes unpacked per byte of the archive; packed images stay near 1, plain text below 20."""
    allowance: int = 64 << 20
    """Bytes that even the smallest archive may unpack to."""


@dataclass(frozen=True)
class _Member:
    name: str
    kind: Literal["file", "folder", "other"]
    open: Callable[[], IO[bytes]]


class _Budget:
    """What may still come out of one archive; asking for more is refused before it is written."""

    def __init__(self, archive: Path, limits: Limits) -> None:
        self.archive = archive.name
        self.limits = limits
        self.bytes = min(limits.size, max(limits.allowance, int(limits.ratio * archive.stat().st_size)))
        self._spent = 0
        self._members = 0

    def spend(self, amount: int) -> None:
        self._spent += amount
        if self._spent > self.bytes:
            raise AlmrrError(
                f"{self.archive} unpacks to more than {format_amount(self.bytes, 'B')}, which no honest archive of its "
                "size does; nothing was unpacked. Fetch it from a place that you trust."
            )

    def count_member(self) -> None:
        self._members += 1
        if self._members > self.limits.files:
            raise AlmrrError(
                f"{self.archive} holds more than {self.limits.files} files; nothing was unpacked. "
                "Fetch it from a place that you trust."
            )


class _Metered(io.RawIOBase):
    """A stream that spends a budget as it is read, in blocks small enough to notice a bomb in time."""

    def __init__(self, stream: IO[bytes], budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        blocks = []
        left = size if size >= 0 else self._budget.bytes + 1
        while left > 0 and (block := self._stream.read(min(left, _BLOCK))):
            self._budget.spend(len(block))
            blocks.append(block)
            left -= len(block)
        return b"".join(blocks)

    def close(self) -> None:
        self._stream.close()
        super().close()


def unpack(archive: Path, target: Path, *, limits: Limits | None = None) -> None:
    """Unpack a zip, tar, tar.gz, tar.bz2 or tar.xz; which one it is, its content says, not its name.

    The members are written to a folder beside `target`, which is renamed when all are there: `target`, which must not
    exist, is complete or absent. Only files and folders are made, with ordinary permissions.

    Raises:
        AlmrrError: the archive is missing, broken or truncated, or a member is neither file nor folder, lies outside
            the target, comes twice, or exceeds the limits.
        DiskError: the disk is full, or the target may not be written.
    """
    if not archive.is_file():
        raise AlmrrError(f"There is no archive at {archive}; check the path.")
    with report_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".unpacking-{target.name}")
        if beside.exists():  # a run that was killed has left it
            remove_folder(beside)
        beside.mkdir()
        try:
            with _report_broken(archive):
                _write_members(archive, beside, limits or Limits())
            beside.rename(target)
        finally:
            if beside.exists():
                remove_folder(beside)


@contextmanager
def _report_broken(archive: Path) -> Iterator[None]:
    """Turn the many ways in which an archive can be broken into one sentence."""
    try:
        yield
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 say "invalid data" without one
            raise
        reason = str(error) or type(error).__name__
        raise AlmrrError(f"{archive.name} is truncated or broken ({reason}); fetch it again.") from error


def _write_members(archive: Path, folder: Path, limits: Limits) -> None:
    with archive.open("rb") as raw:
        members = _zip_members(archive) if raw.read(2) == b"PK" else _tar_members(archive, _Budget(archive, limits))
    written = _Budget(archive, limits)
    with track(None, unit="files", description=f"unpack {archive.name}") as advance:
        for member in members:
            written.count_member()
            _write_member(member, _place_of(member, folder, archive), archive, written)
            advance(1)


def _place_of(member: _Member, folder: Path, archive: Path) -> Path:
    """Where a member belongs; refuses what would leave the folder, on this system or any other."""
    windows = PureWindowsPath(member.name)
    parts = PurePosixPath(member.name).parts
    nameless = member.kind == "file" and not parts
    if windows.anchor or "\\" in member.name or ".." in parts or parts[:1] == ("/",) or nameless:
        raise AlmrrError(
            f"{archive.name} holds the path {member.name!r}, which leads out of its folder; nothing was unpacked. "
            "Fetch it from a place that you trust."
        )
    if member.kind == "other":
        raise AlmrrError(
            f"{archive.name} holds {member.name!r}, a link or a device or a sparse file; only plain files and "
            "folders are unpacked, so nothing was. Fetch it from a place that you trust, or pack it again without."
        )
    if not member.name.isprintable() or not _is_unicode(member.name):
        raise AlmrrError(f"{archive.name} holds the name {member.name!r}, which is not UTF-8 text; pack it again.")
    return folder.joinpath(*parts)


def _is_unicode(name: str) -> bool:
    """False for the stand-ins by which Python keeps bytes that are no UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _write_member(member: _Member, place: Path, archive: Path, budget: _Budget) -> None:
    try:
        if member.kind == "folder":
            place.mkdir(parents=True, exist_ok=True)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("xb") as copy, _Metered(member.open(), budget) as stream:
            shutil.copyfileobj(cast(IO[bytes], stream), copy, _BLOCK)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise AlmrrError(
            f"{archive.name} holds {member.name!r} twice, or as a file and a folder; nothing was unpacked. "
            "Pack it again."
        ) from None


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 when it was not packed on Unix
            folder = info.filename.endswith("/") or kind == stat.S_IFDIR
            regular = kind in {0, stat.S_IFREG}
            yield _Member(
                info.filename,
                "folder" if folder else "file" if regular else "other",
                partial(opened.open, info),
            )


def _open_tarred(opened: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    return cast(IO[bytes], opened.extractfile(info))


def _tar_members(archive: Path, budget: _Budget) -> Iterator[_Member]:
    """Read a tar in one pass; the decompressor is ours, because tarfile's own takes a truncated stream for an end.

    The budget is for all that comes out of the decompressor, headers and what lies behind the last member included.
    """
    with archive.open("rb") as raw:
        start = raw.read(6)
    opener = next((opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic)), None)
    if opener is None:
        _check_end_of_tar(archive)
    stream = _Metered(cast(IO[bytes], opener(archive)) if opener else archive.open("rb"), budget)
    with stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as opened:
        for info in opened:
            regular = info.isreg() and not info.issparse()  # a sparse file's holes are made up, whatever their size
            yield _Member(
                info.name,
                "folder" if info.isdir() else "file" if regular else "other",
                partial(_open_tarred, opened, info),
            )
        while stream.read(_BLOCK):  # on to the checksum at the end of the compressed stream
            pass


def _check_end_of_tar(archive: Path) -> None:
    """A tar ends with blocks of zeros; without them it was cut off, perhaps between two members."""
    with archive.open("rb") as raw:
        size = raw.seek(0, io.SEEK_END)
        raw.seek(max(0, size - _TAR_BLOCK))
        end = raw.read()
        raw.seek(0)
        start = raw.read(_TAR_BLOCK)
    if b"ustar" not in start[257:265]:
        raise tarfile.ReadError(f"it is neither a zip nor a tar file and begins with {start[:24]!r}")
    if end.strip(b"\0"):
        raise tarfile.ReadError("the end of the tar file is missing")
