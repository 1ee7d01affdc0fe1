"""Bring a data set's raw files to disk from the first place that has them.

The places, in this order: what the user names in `data.source`, the mirror, the public addresses. A place may be a
folder, an archive on disk or an archive behind an http(s) address.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.datasets.download import downloaded, shown
from almrr_pipeline.common.errors import DiskError
from almrr_pipeline.common.files import empty_folder, hash_file, remove_folder
from almrr_pipeline.datasets.base import FetchRequest
from almrr_pipeline.datasets.unpack import unpack

logger = logging.getLogger(__name__)

Extract = Callable[[Path, bool], None]
"""Find the data in a folder and bring it to the target; True says that it may be moved: the folder is thrown away."""


@dataclass(frozen=True)
class Archive:
    """A published file that holds a data set, or a part of it."""

    key: str
    """Source name or category id: where `data.source`, `data.addresses` and `data.sha256` speak of it."""
    file_name: str
    """What it is called in a mirror."""
    addresses: tuple[str, ...]
    sha256: str | None = None
    shared: bool = False
    """Other categories lie in it too: once unpacked, it is kept in the scratch folder."""


@dataclass(frozen=True)
class DownloadSpec:
    """All that is known of where a data set can be had."""

    name: str
    """For messages."""
    folder: str
    """Where it lies in a mirror that is a folder, such as mvtec_ad/carpet."""
    archives: tuple[Archive, ...]
    """The preferred one first."""


@dataclass(frozen=True)
class _Place:
    archive: Archive
    address: str
    """Path of a folder or file, or an http(s) address."""
    sha256: str | None


def obtain(offer: DownloadSpec, *, target: Path, request: FetchRequest, take: Extract) -> None:
    """Try one place after the other until `take` has found its data.

    Args:
        offer: what is wanted and where it may lie.
        target: the folder that `take` fills; emptied between two attempts.
        request: mirror, own archives, addresses and checksums of the user.
        take: brings the data from an unpacked folder to the target; raises AlmrrError where the data is not there.

    Raises:
        AlmrrError: no place has it; lists each place and what was wrong with it.
        DiskError: the disk is full, or may not be written.
    """
    failures = []
    for place in _find_places(offer, request):
        logger.info("%s: looking at %s", offer.name, shown(place.address))
        try:
            with _opened(place, offer, request) as (folder, is_ours):
                return take(folder, is_ours)
        except DiskError:
            raise
        except AlmrrError as error:
            reason = str(error).rstrip(".")
            if is_local(offer, request):
                raise AlmrrError(f"data.source.{place.archive.key}: {place.address}: {reason}.") from error
            logger.warning("%s: %s: %s", offer.name, shown(place.address), reason)
            failures.append(f"{shown(place.address)} ({reason})")
            empty_folder(target)
    raise AlmrrError(
        f"{offer.name} could not be fetched: {'; '.join(failures) or 'no address is known'}. "
        f"Name another address in data.addresses.{offer.archives[0].key}, or fetch "
        f"{' or '.join(archive.file_name for archive in offer.archives)} by hand and say where it lies: "
        f"{' or '.join(f'data.source.{archive.key}: PATH' for archive in offer.archives)}."
    )


def local_path(address: str) -> Path | None:
    """Return the path that an address means: file:// or a plain path; None for http:// and https://.

    Raises:
        AlmrrError: the address is of another kind.
    """
    parts = urlsplit(address)
    if parts.scheme in {"http", "https"}:
        return None
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    if "://" in address:
        raise AlmrrError(f"{address}: only http://, https://, file:// and paths can be read; use one of these.")
    return Path(address).expanduser()


def check_mirror(mirror: str | None) -> None:
    """Make sure that a mirror on disk is there; one behind http(s) is only asked when something is wanted.

    Raises:
        AlmrrError: there is no such folder.
    """
    path = local_path(mirror) if mirror else None
    if path is not None and not path.is_dir():
        raise AlmrrError(f"data.mirror: there is no folder {path}; correct the path, or set it to null.")


def is_local(offer: DownloadSpec, request: FetchRequest) -> bool:
    """Whether the user has named an archive or folder of their own, which serves instead of any address."""
    return any(archive.key in request.local for archive in offer.archives)


def _find_places(offer: DownloadSpec, request: FetchRequest) -> Iterator[_Place]:
    for archive in offer.archives:
        if own := request.local.get(archive.key):
            path = Path(own).expanduser()
            if not path.exists():
                raise AlmrrError(f"data.source.{archive.key}: there is nothing at {path}; correct the path.")
            yield _Place(archive, str(path), request.sha256.get(archive.key))
            return
    if request.mirror:
        yield from _places_in_mirror(offer, request)
    for archive in offer.archives:
        for address in request.addresses.get(archive.key, archive.addresses):
            yield _place_at(archive, address, request)


def _places_in_mirror(offer: DownloadSpec, request: FetchRequest) -> Iterator[_Place]:
    mirror = str(request.mirror)
    check_mirror(mirror)
    base = local_path(mirror)
    if base is None:
        for archive in offer.archives:
            yield _place_at(archive, f"{mirror.rstrip('/')}/{archive.file_name}", request)
        return
    if (base / offer.folder).is_dir():
        yield _place_at(offer.archives[0], str(base / offer.folder), request)
    for archive in offer.archives:
        for folder in (base, base / offer.folder, (base / offer.folder).parent):
            if (folder / archive.file_name).is_file():
                yield _place_at(archive, str(folder / archive.file_name), request)
                break


def _place_at(archive: Archive, address: str, request: FetchRequest) -> _Place:
    return _Place(archive, address, request.sha256.get(archive.key, archive.sha256))


@contextmanager
def _opened(place: _Place, offer: DownloadSpec, request: FetchRequest) -> Iterator[tuple[Path, bool]]:
    """Give a folder with what lies at a place, and whether its files may be moved away."""
    path = local_path(place.address)
    if path is not None and path.is_dir():
        yield path, False
    elif path is not None and not path.exists():
        raise AlmrrError("there is no such file")
    elif place.archive.shared:
        yield _unpack_shared(place, request), False
    else:
        work = request.scratch / f"unpacked-{offer.name}"
        if work.exists():  # a run that was killed has left it
            remove_folder(work)
        try:
            _unpack_place(place, work, request)
            yield work, True
        finally:
            if work.exists():
                remove_folder(work)


def _unpack_shared(place: _Place, request: FetchRequest) -> Path:
    """Unpack an archive of several categories once; what lies there under its name is complete."""
    path = local_path(place.address)
    state = "" if path is None else f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    version = hashlib.sha256(f"{place.address} {place.sha256} {state}".encode()).hexdigest()[:12]
    folder = request.scratch / f"{place.archive.key}-{version}"
    if not folder.is_dir():
        _unpack_place(place, folder, request)
    return folder


def _unpack_place(place: _Place, folder: Path, request: FetchRequest) -> None:
    path = local_path(place.address)
    if path is not None:
        if place.sha256 and (found := hash_file(path)) != place.sha256.lower():
            raise AlmrrError(f"{path.name} has the sha256 {found}, expected was {place.sha256.lower()}")
        unpack(path, folder)
        return
    with downloaded(
        place.address,
        folder=request.scratch,
        file_name=place.archive.file_name,
        sha256=place.sha256,
        retry_policy=request.retry_policy,
    ) as archive:
        unpack(archive, folder)
