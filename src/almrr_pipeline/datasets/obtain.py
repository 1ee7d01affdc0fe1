"""Fetching of a dataset's raw files from the first place that has them.

Places are tried in this order: the user's `data.paths`, the mirror, the addresses. A place is a
folder, an archive on disk, or an archive behind an http(s) address.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    file_name: str
    """Its name in a mirror."""
    addresses: tuple[str, ...]
    sha256: str | None = None
    shared: bool = False
    """It contains other categories too: once unpacked, it is kept in the scratch folder."""


@dataclass(frozen=True)
class DownloadSpec:
    """Where a dataset can be downloaded from."""

    name: str
    folder: str
    """Its folder in a mirror that is a folder, such as mvtec_ad/carpet."""
    archives: tuple[Archive, ...]
    """In the order of preference."""


class ArchivedDataset(Dataset):
    """Base of datasets that are published as archives; it implements `fetch`."""

    def spec(self, category: str) -> DownloadSpec:
        """Return where a category can be downloaded from."""
        raise NotImplementedError

    def extract(self, category: str, folder: Path) -> list[Path]:
        """Return a category's files and folders in an unpacked archive; AlmrrError if absent."""
        raise NotImplementedError

    def verify(self, category: str, target: Path, request: FetchRequest) -> None:
        """Compare the counts of a filled `target` with the published ones, as `check_counts`."""
        items, expected = self.items(category, target), self.expected(category)
        check_counts(items, expected, name=category, strict=request.settings.strict)

    def fetch(self, category: str, *, target: Path, request: FetchRequest) -> None:
        """Fill `target` from the first place that has the category."""
        self.check(category, request)
        logger.info("%s: %s", category, self.license)
        obtain(
            self.spec(category),
            target=target,
            request=request,
            extract=partial(self.extract, category),
            verify=partial(self.verify, category, target, request),
        )


@dataclass(frozen=True)
class _Place:
    archive: Archive
    address: str
    """Path of a folder or file, or an http(s) address."""
    sha256: str | None

    @property
    def path(self) -> Path | None:
        return local_path(self.address)

    @property
    def shown(self) -> str:
        """The address for messages: without secrets, but local paths in full."""
        return redact_address(self.address) if self.path is None else self.address


def obtain(
    spec: DownloadSpec,
    *,
    target: Path,
    request: FetchRequest,
    extract: Callable[[Path], list[Path]],
    verify: Callable[[], None],
) -> None:
    """Try one place after the other until one fills `target` with what passes `verify`.

    Args:
        spec: what is wanted and where it may be.
        target: an existing empty folder; emptied again between two attempts.
        request: the user's settings.
        extract: returns the files and folders to bring into the target; AlmrrError if absent.
        verify: raises AlmrrError if the filled target is not the dataset.

    Raises:
        AlmrrError: no place has it; lists each place and what was wrong with it.
        DiskError: the disk is full, or cannot be written.
    """
    failures = []
    for place in _find_places(spec, request):
        logger.info("%s: looking at %s", spec.name, place.shown)
        try:
            with _opened(place, spec.name, request) as (folder, is_temporary):
                transfer(extract(folder), target, move=is_temporary)
            verify()
            return
        except DiskError:
            raise
        except AlmrrError as error:
            reason = str(error).rstrip(".")
            if has_own_path(spec, request):
                setting = f"data.paths.{place.archive.key}"
                raise AlmrrError(f"{setting}: {place.address}: {reason}.") from error
            logger.warning("%s: %s: %s", spec.name, place.shown, reason)
            failures.append(f"{place.shown} ({reason})")
            empty_folder(target)
    raise AlmrrError(
        f"{spec.name} could not be fetched: {'; '.join(failures) or 'no address is known'}. "
        f"Add another address to data.addresses.{spec.archives[0].key}, or download "
        f"{' or '.join(archive.file_name for archive in spec.archives)} by hand and set "
        f"{' or '.join(f'data.paths.{archive.key}' for archive in spec.archives)} to its path."
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


def check_mirror(mirror: str | None) -> None:
    """Raise AlmrrError if a mirror on disk does not exist; one behind http(s) is not asked."""
    path = local_path(mirror) if mirror else None
    if path is not None and not path.is_dir():
        raise AlmrrError(f"data.mirror: there is no folder {path}; correct the path.")


def check_path(key: str, request: FetchRequest) -> Path:
    """Return `data.paths.KEY`; AlmrrError if there is no such file or folder."""
    path = Path(request.settings.paths[key]).expanduser()
    if not path.exists():
        raise AlmrrError(f"data.paths.{key}: there is nothing at {path}; correct the path.")
    return path


def has_own_path(spec: DownloadSpec, request: FetchRequest) -> bool:
    """Whether the user has an archive or folder of the dataset, used instead of any address."""
    return any(request.settings.paths.get(archive.key) for archive in spec.archives)


def _find_places(spec: DownloadSpec, request: FetchRequest) -> Iterator[_Place]:
    for archive in spec.archives:
        if request.settings.paths.get(archive.key):
            path = check_path(archive.key, request)
            yield _Place(archive, str(path), request.settings.sha256.get(archive.key))
            return
    if request.settings.mirror:
        yield from _places_in_mirror(request.settings.mirror, spec, request)
    for archive in spec.archives:
        for address in request.settings.addresses.get(archive.key, archive.addresses):
            yield _place_at(archive, address, request)


def _places_in_mirror(mirror: str, spec: DownloadSpec, request: FetchRequest) -> Iterator[_Place]:
    check_mirror(mirror)
    base = local_path(mirror)
    if base is None:
        for archive in spec.archives:
            yield _place_at(archive, f"{mirror.rstrip('/')}/{archive.file_name}", request)
        return
    own = base / spec.folder
    if own.is_dir():
        yield _place_at(spec.archives[0], str(own), request)
    for archive in spec.archives:
        for folder in (base, own, own.parent):
            if (folder / archive.file_name).is_file():
                yield _place_at(archive, str(folder / archive.file_name), request)
                break


def _place_at(archive: Archive, address: str, request: FetchRequest) -> _Place:
    return _Place(archive, address, request.settings.sha256.get(archive.key, archive.sha256))


@contextmanager
def _opened(place: _Place, name: str, request: FetchRequest) -> Iterator[tuple[Path, bool]]:
    """Provide a folder with a place's content, and whether it is temporary."""
    path = place.path
    if path is not None and path.is_dir():
        yield path, False
    elif path is not None and not path.exists():
        raise AlmrrError("there is no such file")
    elif place.archive.shared:
        yield _unpack_shared(place, request), False
    else:
        work = request.scratch / f"unpacked-{name}"
        remove_folder(work)  # a killed run may have left it
        try:
            _unpack_place(place, work, request)
            yield work, True
        finally:
            remove_folder(work)


def _unpack_shared(place: _Place, request: FetchRequest) -> Path:
    """Unpack an archive of several categories once; an existing folder of its name is complete."""
    identity = f"{place.address} {place.sha256} "
    if place.path is not None:
        identity += f"{place.path.stat().st_size} {place.path.stat().st_mtime_ns}"
    version = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = request.scratch / f"{place.archive.key}-{version}"
    if not folder.is_dir():
        _unpack_place(place, folder, request)
    return folder


def _unpack_place(place: _Place, folder: Path, request: FetchRequest) -> None:
    path, expected = place.path, (place.sha256 or "").lower()
    if path is not None:
        if expected and (found := hash_file(path)) != expected:
            raise AlmrrError(f"{path.name} has the sha256 {found}, expected was {expected}")
        unpack(path, folder)
        return
    with downloaded(
        place.address,
        folder=request.scratch,
        file_name=place.archive.file_name,
        sha256=expected or None,
        retry_policy=request.retry_policy,
    ) as archive:
        unpack(archive, folder)
