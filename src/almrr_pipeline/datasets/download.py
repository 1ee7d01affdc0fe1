"""Fetch one file over HTTP: resumed after an interruption, tried again after a fault, checked when it is there.

The connection, redirects, proxies and retries are those of requests and urllib3; what is added here is to go on where
a broken transfer stopped (RFC 9110, sections 13.1.5 and 14).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.progress import format_amount, track
from almrr_pipeline.common.errors import DiskError
from almrr_pipeline.common.files import hash_file, remove_folder, report_disk_errors
from almrr_pipeline.datasets.base import RetryPolicy

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_PARTIAL_CONTENT = 206


class _BrokenOffError(Exception):
    """The transfer stopped before its end; the next try may go on from there."""


class _Partial:
    """What has arrived of one address so far, and the note that says of which version of the file it is a part."""

    def __init__(self, folder: Path, file_name: str, address: str) -> None:
        key = hashlib.sha256(address.encode()).hexdigest()[:12]  # two addresses never add to the same file
        self.folder = folder / key
        self.data = self.folder / file_name
        self._record = self.folder / "download.json"

    @property
    def size(self) -> int:
        return self.data.stat().st_size if self.data.exists() else 0

    def read_record(self) -> dict[str, str]:
        """Return the validator (ETag or Last-Modified) and total size that the first answer named, as far as it did."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def is_complete(self) -> bool:
        return self.size > 0 and str(self.size) == self.read_record().get("total")

    def range_headers(self) -> dict[str, str]:
        """Ask for the rest, on condition that the file is still the same; without a validator, for the whole."""
        validator = self.read_record().get("validator")
        if not self.size or not validator:
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": validator}

    def continues(self, response: requests.Response) -> bool:
        """Whether an answer with a part begins where ours ends, and is of the same file."""
        unit, _, place = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = place.partition("/")
        record = self.read_record()
        same = validator_of(response) in {None, record.get("validator")} and total in {"*", record.get("total")}
        return unit == "bytes" and span.partition("-")[0] == str(self.size) and same

    def begin(self, response: requests.Response) -> None:
        """Start over with this answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data.write_bytes(b"")
        self._write_record(validator_of(response), response.headers.get("Content-Length"))

    def finish(self) -> None:
        """Note that all has arrived, as a server that named no size could not."""
        self._write_record(self.read_record().get("validator"), str(self.size))

    def discard(self) -> None:
        if self.folder.exists():
            remove_folder(self.folder)

    def _write_record(self, validator: str | None, total: str | None) -> None:
        record = {"validator": validator, "total": total}
        self._record.write_text(json.dumps({key: value for key, value in record.items() if value}), encoding="utf-8")


def validator_of(response: requests.Response) -> str | None:
    """Return what tells this version of a file from another: a strong ETag, else the time of its last change."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


@contextmanager
def downloaded(address: str, *, folder: Path, file_name: str, sha256: str | None, retry_policy: RetryPolicy) -> Iterator[Path]:
    """Fetch a file, and keep it until the work with it is done.

    What an interrupted run has left in `folder` is continued, also when it was interrupted in the work that followed
    the download, or when that failed for want of disk space. A file that proves to be broken is removed.

    Args:
        address: http:// or https:// address.
        folder: where the file is kept meanwhile.
        file_name: what it shall be called there.
        sha256: its checksum, or None where none is known.
        patience: retries, waits and time-outs.

    Yields:
        The complete file.

    Raises:
        AlmrrError: the server has no such file, or stopped answering, or the checksum differs.
        DiskError: the disk is full, or the folder may not be written.
    """
    partial = _Partial(folder, file_name, address)
    with report_disk_errors(folder), requests.Session() as session:
        retries = HTTPAdapter(max_retries=_retries(retry_policy))
        session.mount("http://", retries)
        session.mount("https://", retries)
        _receive_checked(session, address, partial, sha256, retry_policy)
    try:
        yield partial.data
    except DiskError:
        raise
    except AlmrrError:
        partial.discard()
        raise
    partial.discard()


def shown(address: str) -> str:
    """Return an address fit for a message: without user name, password and query, which may be secret."""
    parts = urlsplit(address)
    if parts.scheme not in {"http", "https"}:
        return address
    query = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def _retries(retry_policy: RetryPolicy) -> urllib3.Retry:
    """Retries of what fails before the first byte: connections, and answers that a server is busy."""
    return urllib3.Retry(
        total=retry_policy.attempts - 1,
        backoff_factor=retry_policy.backoff,
        status_forcelist=_BUSY,
        raise_on_status=False,
        respect_retry_after_header=False,  # some servers say an hour; the next address is sooner
    )


def _receive_checked(
    session: requests.Session, address: str, partial: _Partial, sha256: str | None, retry_policy: RetryPolicy
) -> None:
    kept = partial.size
    if kept:
        logger.info("%s: %s have arrived before", partial.data.name, format_amount(kept, "B"))
    _receive(session, address, partial, retry_policy)
    found = hash_file(partial.data) if sha256 else None
    if sha256 and found != sha256.lower():
        partial.discard()
        if kept:
            logger.warning("%s: what an earlier run has left does not fit; starting over", partial.data.name)
            return _receive_checked(session, address, partial, sha256, retry_policy)
        raise AlmrrError(f"{partial.data.name} has the sha256 {found}, expected was {sha256.lower()}")
    return partial.finish()


def _receive(session: requests.Session, address: str, partial: _Partial, retry_policy: RetryPolicy) -> None:
    """Fetch what is missing; tries count only while nothing new arrives."""
    failures, most = 0, partial.size
    while not partial.is_complete():
        try:
            return _receive_once(session, address, partial, retry_policy)
        except _BrokenOffError as error:
            failures = 1 if partial.size > most else failures + 1
            most = max(most, partial.size)
            if failures >= retry_policy.attempts:
                raise AlmrrError(f"{error}, {failures} times in a row") from error
            wait = retry_policy.backoff * 2 ** (failures - 1)
            logger.warning("%s: %s; trying again in %.0f s", shown(address), error, wait)
            time.sleep(wait)
    return None


def _receive_once(session: requests.Session, address: str, partial: _Partial, retry_policy: RetryPolicy) -> None:
    headers = {"Accept-Encoding": "identity", **partial.range_headers()}
    try:
        response = session.get(address, headers=headers, stream=True, timeout=retry_policy.timeout)
    except requests.RequestException as error:
        raise AlmrrError(_reason(error)) from error
    with response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            partial.discard()
            raise _BrokenOffError("the file has become shorter")
        if not response.ok:
            raise AlmrrError(f"the server answers {response.status_code} {response.reason}")
        if response.status_code != _PARTIAL_CONTENT:
            partial.begin(response)
        elif not partial.continues(response):
            partial.discard()
            raise _BrokenOffError("the file has changed since the download began")
        _write_body(response, partial)


def _write_body(response: requests.Response, partial: _Partial) -> None:
    total = partial.read_record().get("total")
    size = int(total) if total and total.isdecimal() else None
    try:
        with (
            partial.data.open("ab") as stream,
            track(size, unit="B", description=f"download {partial.data.name}", done=partial.size) as advance,
        ):
            for block in response.raw.stream(_BLOCK, decode_content=False):
                stream.write(block)
                advance(len(block))
    except urllib3.exceptions.HTTPError as error:
        raise _BrokenOffError(f"the connection broke off after {format_amount(partial.size, 'B')}") from error
    if size is not None and partial.size != size:
        raise _BrokenOffError(f"the connection ended after {partial.size} of {size} bytes")


def _reason(error: requests.RequestException) -> str:
    """Say in a few words why there was no answer; the libraries nest the cause several layers deep."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    cause: object = error
    while isinstance(cause, BaseException):
        inner = getattr(cause, "reason", None) or (cause.args[0] if cause.args else None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    return f"no connection ({str(cause).rpartition(': ')[2]})"
