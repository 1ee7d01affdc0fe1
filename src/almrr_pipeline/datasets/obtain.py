"""Fetching of a dataset's raw files from the first place that has them.

Places are tried in this order: the user's `data.paths`, the mirror, the addresses. A place is a
folder, an archive on disk, or an archive behind an http(s) address.
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from almrr_pipeline.common.errors import AlmrrError, DiskError
from almrr_pipeline.common.files import empty_folder, hash_file, remove_folder, transfer
from almrr_pipeline.common.redaction import redact_address
from almrr_pipeline.datasets.base import Dataset, FetchRequest
from almrr_pipeline.datasets.download import downloaded
from almrr_pipeline.datasets.manifest import check_counts
from almrr_pipeline.datasets.unpack import unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A published file that contains a dataset, or one category of it."""

    key: str
    """Dataset name or category id: its key in `data.paths`, `data.addresses` and `data.sha256`."""
    file_name: str  # its name in a mirror
    addresses: tuple[str, ...]
    sha256: str | None = None
    shared: bool = False
    """It contains other categories too: once unpacked, it is kept in the scratch folder."""
    folder: str = ""
    """Its content in a mirror that is a folder, such as mvtec_ad/carpet; `key` if empty."""


_Place = tuple[Archive, str]
"""An archive with the checksum to expect, and its address: http(s), a file or a folder."""


class ArchivedDataset(Dataset):
    """Base of datasets that are published as archives; it implements `fetch`."""

    archive: Archive
    """The only one; a dataset with others overrides `archives`."""

    def archives(self, category: str) -> tuple[Archive, ...]:
        """Return the archives that contain a category, in the order of preference."""
        return (self.archive,)

    @abstractmethod
    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return a category's files and folders in an unpacked archive; AlmrrError if absent."""

    def verify(self, category: str, target: Path, request: FetchRequest) -> None:
        """Compare the counts of a filled `target` with the published ones, as `check_counts`."""
        items, expected = self.items(category, target), self.expected(category)
        check_counts(items, expected, name=category, strict=request.settings.strict)

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Try one place after the other until one fills `target` with what passes `verify`.

        Raises:
            AlmrrError: no place has it; lists each place and what was wrong with it.
            DiskError: the disk is full, or cannot be written.
        """
        self.check(category, request)
        logger.info("%s: %s", category, self.license)
        archives, failures = self.archives(category), []
        name = archives[0].key
        for archive, address in _find_places(archives, request):
            shown = redact_address(address) if local_path(address) is None else address
            logger.info("%s: looking at %s", name, shown)
            try:
                with _opened(archive, address, request) as (folder, is_temporary):
                    transfer(self.extract(category, folder), target, move=is_temporary)
                self.verify(category, target, request)
                return
            except DiskError:
                raise
            except AlmrrError as error:
                reason = str(error).rstrip(".")
                if has_own_path(archives, request):
                    raise AlmrrError(f"data.paths.{archive.key}: {address}: {reason}.") from error
                logger.warning("%s: %s: %s", name, shown, reason)
                failures.append(f"{shown} ({reason})")
                empty_folder(target)
        raise AlmrrError(
            f"{name} could not be fetched: {'; '.join(failures) or 'no address is known'}. "
            f"Add another address to data.addresses.{name}, or download "
            f"{' or '.join(archive.file_name for archive in archives)} by hand and set "
            f"{' or '.join(f'data.paths.{archive.key}' for archive in archives)} to its path."
        )


def local_path(address: str) -> Path | None:
    """Return the path of file://... or of a path, None for http(s)://; AlmrrError for others."""
    parts = urlsplit(address)
    if parts.scheme in {"http", "https"}:
        return None
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    if "://" in address:
        raise AlmrrError(f"{address}: only http(s)://, file:// and paths can be read.")
    return Path(address).expanduser()


def check_mirror(mirror: str | None) -> Path | None:
    """Return a mirror's path, None behind http(s); AlmrrError if there is no such folder."""
    path = local_path(mirror) if mirror else None
    if path is not None and not path.is_dir():
        raise AlmrrError(f"data.mirror: there is no folder {path}; correct the path.")
    return path


def check_path(key: str, request: FetchRequest) -> Path:
    """Return `data.paths.KEY`; AlmrrError if there is no such file or folder."""
    path = Path(request.settings.paths[key]).expanduser()
    if not path.exists():
        raise AlmrrError(f"data.paths.{key}: there is nothing at {path}; correct the path.")
    return path


def has_own_path(archives: Sequence[Archive], request: FetchRequest) -> bool:
    """Whether the user has an archive or folder of the dataset, used instead of any address."""
    return any(request.settings.paths.get(archive.key) for archive in archives)


def _find_places(archives: Sequence[Archive], request: FetchRequest) -> Iterator[_Place]:
    settings = request.settings
    for archive in archives:
        if settings.paths.get(archive.key):
            own = replace(archive, sha256=settings.sha256.get(archive.key))
            yield own, str(check_path(archive.key, request))
            return
    wanted = [replace(each, sha256=settings.sha256.get(each.key, each.sha256)) for each in archives]
    if settings.mirror:
        yield from _find_in_mirror(wanted, settings.mirror)
    for archive in wanted:
        for address in settings.addresses.get(archive.key, archive.addresses):
            yield archive, address


def _find_in_mirror(archives: Sequence[Archive], mirror: str) -> Iterator[_Place]:
    base = check_mirror(mirror)
    if base is None:
        yield from ((each, f"{mirror.rstrip('/')}/{each.file_name}") for each in archives)
        return
    own = base / (archives[0].folder or archives[0].key)
    if own.is_dir():
        yield archives[0], str(own)
    for archive in archives:
        files = [folder / archive.file_name for folder in (base, own, own.parent)]
        yield from [(archive, str(file)) for file in files if file.is_file()][:1]


@contextmanager
def _opened(archive: Archive, address: str, request: FetchRequest) -> Iterator[tuple[Path, bool]]:
    """Provide a folder with a place's content, and whether it is temporary."""
    path = local_path(address)
    if path is not None and path.is_dir():
        yield path, False
    elif path is not None and not path.exists():
        raise AlmrrError("there is no such file")
    elif archive.shared:  # unpacked once; an existing folder of its name is complete
        identity = f"{address} {archive.sha256} "
        if path is not None:
            identity += f"{path.stat().st_size} {path.stat().st_mtime_ns}"
        version = hashlib.sha256(identity.encode()).hexdigest()[:12]
        folder = request.scratch / f"{archive.key}-{version}"
        if not folder.is_dir():
            _unpack(archive, address, folder, request)
        yield folder, False
    else:
        folder = request.scratch / f"unpacked-{archive.key}"
        remove_folder(folder)  # a killed run may have left it
        try:
            _unpack(archive, address, folder, request)
            yield folder, True
        finally:
            remove_folder(folder)


def _unpack(archive: Archive, address: str, folder: Path, request: FetchRequest) -> None:
    path, expected = local_path(address), (archive.sha256 or "").lower()
    if path is not None:
        if expected and (found := hash_file(path)) != expected:
            raise AlmrrError(f"{path.name} has the sha256 {found}, expected was {expected}")
        unpack(path, folder)
        return
    with downloaded(
        address,
        folder=request.scratch,
        file_name=archive.file_name,
        sha256=expected or None,
        retry_policy=request.retry_policy,
    ) as file:
        unpack(file, folder)
