"""Safe unpacking of untrusted archives: plain files and folders inside the target, all or nothing.

The checks are made here, the same for both formats, because tarfile's data filter and zipfile admit
more: links, absolute paths made relative, Windows paths, names that come twice, any size. The
decompressor of a tar is opened here too, because tarfile takes a truncated stream for its end.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import logging
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, NamedTuple, cast

from almrr_pipeline.common.errors import AlmrrError, quote
from almrr_pipeline.common.files import remove_folder, report_disk_errors
from almrr_pipeline.common.progress import format_amount, track

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_UTF8_FLAG = 0x800  # of a zip's member
_COMPRESSIONS = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\x00": lzma.LZMAFile}
"""First bytes of a compressed file, and what reads it."""
_DECODING = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, struct.error)
_BROKEN = (*_DECODING, EOFError, RuntimeError, ValueError, OverflowError, MemoryError)
"""What broken archives raise; RuntimeError for encryption and for unknown compressions."""
_OF_CONTENT = {None, errno.EINVAL, errno.ENAMETOOLONG}
"""Of an OSError for what an archive holds; gzip and bz2 raise "invalid data" without a number."""
_WINDOWS = {0, 10, 14}
"""Systems in a zip's headers, by APPNOTE 4.4.2: MS-DOS, NTFS and VFAT."""
_ADVICE = "nothing was unpacked. Fetch it from a place that you trust"


@dataclass(frozen=True)
class Limits:
    """Largest content of an archive. MVTec AD, the largest real one, has 7,000 files and 5 GiB."""

    files: int = 100_000
    size: int = 32 << 30  # bytes in all
    ratio: float = 100.0
    """Bytes unpacked per byte of the archive; images have about 1, plain text less than 20."""
    allowance: int = 64 << 20  # bytes that even the smallest archive may unpack to

    def check_size(self, size: int, archive: Path) -> None:
        """Raise AlmrrError if `archive` may not unpack to `size` bytes."""
        packed = archive.stat().st_size
        allowed = min(self.size, max(self.allowance, int(self.ratio * packed)))
        if size > allowed:
            raise AlmrrError(
                f"{archive.name} unpacks to more than {format_amount(allowed, 'B')}, which no "
                f"honest archive of its size does; {_ADVICE}."
            )


class _Member(NamedTuple):
    name: str
    is_folder: bool
    is_file: bool  # False for links, devices and sparse files
    open: Callable[[], IO[bytes] | None]


class _Metered:
    """A stream of limited size; tarfile reads it in blocks small enough to stop a bomb early."""

    def __init__(self, stream: IO[bytes], check_size: Callable[[int], None]) -> None:
        self._stream = stream
        self._check_size = check_size
        self._size = 0

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        self._size += len(block)
        self._check_size(self._size)
        return block


def unpack(archive: Path, target: Path, *, limits: Limits | None = None) -> None:
    """Unpack a zip, tar, tar.gz, tar.bz2 or tar.xz, recognized by its content.

    The members are written to a folder next to `target`, which is renamed when it is complete:
    `target`, which must not exist, is complete or absent. Permissions are not taken over.

    Raises:
        AlmrrError: the archive is missing, broken or truncated, or a member is neither file nor
            folder, is outside the target, comes twice, or exceeds the limits.
        DiskError: the disk is full, or the target cannot be written.
    """
    if not archive.is_file():
        raise AlmrrError(f"There is no archive at {archive}; check the path.")
    partial_target = target.with_name(f".unpacking-{target.name}")
    with report_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_folder(partial_target)  # a killed run may have left it
        partial_target.mkdir()
        try:
            _write_members(archive, partial_target, limits or Limits())
            partial_target.rename(target)
        except (*_BROKEN, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _OF_CONTENT:
                raise  # the disk's
            reason = quote(error) or type(error).__name__
            message = f"{archive.name} is truncated or broken ({reason}); fetch it again."
            raise AlmrrError(message) from error
        finally:
            remove_folder(partial_target)


def _write_members(archive: Path, folder: Path, limits: Limits) -> None:
    with archive.open("rb") as raw:
        members = _zip_members if raw.read(2) == b"PK" else _tar_members
    with track(None, unit="files", description=f"unpack {archive.name}") as advance:
        for count, member in enumerate(members(archive, limits), start=1):
            if count > limits.files:
                raise AlmrrError(f"{archive.name} holds more than {limits.files} files; {_ADVICE}.")
            place = _place_of(member, folder, archive)
            try:
                (place if member.is_folder else place.parent).mkdir(parents=True, exist_ok=True)
                if member.is_file:
                    with place.open("xb") as copy, cast(IO[bytes], member.open()) as content:
                        shutil.copyfileobj(content, copy, _BLOCK)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                found = f"holds {quote(repr(member.name))} twice, or as a file and a folder"
                advice = "nothing was unpacked. Pack it again"
                raise AlmrrError(f"{archive.name} {found}; {advice}.") from None
            advance(1)


def _place_of(member: _Member, folder: Path, archive: Path) -> Path:
    """Return the path of a member in `folder`; refuses what is outside it on any system."""
    windows, named = PureWindowsPath(member.name), quote(repr(member.name))
    parts = PurePosixPath(member.name).parts
    outside = windows.anchor or "\\" in member.name or ".." in parts or parts[:1] == ("/",)
    if outside or (member.is_file and not parts):
        found = f"holds the path {named}, which leads out of its folder"
        raise AlmrrError(f"{archive.name} {found}; {_ADVICE}.")
    if not (member.is_folder or member.is_file):
        found = f"holds {named}, a link or a device or a sparse file"
        raise AlmrrError(f"{archive.name} {found}; {_ADVICE}, or pack it again without.")
    if not member.name.isprintable():  # surrogates, for bytes that are not UTF-8, are not either
        found = f"holds the name {named}, which is not UTF-8 text"
        raise AlmrrError(f"{archive.name} {found}; pack it again.")
    return folder.joinpath(*parts)


def _zip_members(archive: Path, limits: Limits) -> Iterator[_Member]:
    """Read a zip; names that are UTF-8 are taken so without the flag that says it, as of macOS.

    Text of another code page is hardly ever UTF-8 by chance; what is not is taken for code page
    437, as zipfile does, and logged.
    """
    uncertain = []
    with zipfile.ZipFile(archive) as opened:
        # zipfile reads no more of a member than its size in the directory, and checks its CRC.
        limits.check_size(sum(info.file_size for info in opened.infolist()), archive)
        for info in opened.infolist():
            mode = stat.S_IFMT(info.external_attr >> 16)  # 0 when it was not packed on Unix
            name, is_certain = _zip_name(info)
            uncertain += [] if is_certain else [name]
            if info.create_system in _WINDOWS:  # older tools of Windows separate by backslashes
                name = name.replace("\\", "/")
            is_folder = name.endswith("/") or mode == stat.S_IFDIR
            is_file = not is_folder and mode in {0, stat.S_IFREG}
            yield _Member(name, is_folder, is_file, partial(opened.open, info))
    if uncertain:
        logger.warning(
            "%s: the encoding of %d names is not stated; they are taken for code page 437, such as "
            "%s. Pack it again where that is wrong.",
            *(archive.name, len(uncertain), uncertain[0]),
        )


def _zip_name(info: zipfile.ZipInfo) -> tuple[str, bool]:
    """The name of a member, and whether it is certain; see `_zip_members`."""
    if info.flag_bits & _UTF8_FLAG or info.filename.isascii():
        return info.filename, True
    try:
        return info.filename.encode("cp437").decode("utf-8"), True
    except UnicodeError:
        return info.filename, False


def _tar_members(archive: Path, limits: Limits) -> Iterator[_Member]:
    """Read a tar in one pass; headers and what follows the last member count as size too."""
    with archive.open("rb") as raw:
        start = raw.read(6)
    opener = next((each for magic, each in _COMPRESSIONS.items() if start.startswith(magic)), None)
    if opener is None:
        _check_end_of_tar(archive)
    content = cast(IO[bytes], opener(archive)) if opener else archive.open("rb")
    stream = _Metered(content, partial(limits.check_size, archive=archive))
    with content, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as opened:
        for info in opened:
            is_file = info.isreg() and not info.issparse()  # holes have any size at no cost
            yield _Member(info.name, info.isdir(), is_file, partial(opened.extractfile, info))
        while stream.read(_BLOCK):  # on to the checksum at the end of the compressed stream
            pass


def _check_end_of_tar(archive: Path) -> None:
    """Check that a tar ends with a block of zeros, without which it may be cut after a member."""
    with archive.open("rb") as raw:
        start = raw.read(tarfile.BLOCKSIZE)
        raw.seek(max(0, archive.stat().st_size - tarfile.BLOCKSIZE))
        end = raw.read()
    if b"ustar" not in start[257:265]:
        raise tarfile.ReadError(f"neither a zip nor a tar file and begins with {start[:24]!r}")
    if end.strip(b"\0"):
        raise tarfile.ReadError("the end of the tar file is missing")
