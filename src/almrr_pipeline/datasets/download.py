"""Download of one file over HTTP, resumed after an interruption, retried and verified.

Connections, redirects, proxies and retries are those of requests and urllib3. The resuming (RFC
9110, sections 13.1.5 and 14) is written here, because neither they nor pooch continue a broken
download: pooch's begins anew, and archives here have up to 5 GiB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import urllib3
from requests.adapters import HTTPAdapter

from almrr_pipeline.common.errors import AlmrrError, DiskError
from almrr_pipeline.common.files import hash_file, remove_folder, report_disk_errors
from almrr_pipeline.common.progress import format_amount, track
from almrr_pipeline.common.redaction import redact_address
from almrr_pipeline.datasets.base import RetryPolicy

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_PARTIAL_CONTENT = 206


class _BrokenOffError(Exception):
    """The transfer stopped before its end; the next try may continue it."""


class _Partial:
    """The bytes received from one address so far, and which version of the file they belong to."""

    def __init__(self, folder: Path, file_name: str, address: str) -> None:
        key = hashlib.sha256(address.encode()).hexdigest()[:12]  # one folder per address
        self.folder = folder / key
        self.data = self.folder / file_name
        self._record = self.folder / "download.json"

    @property
    def size(self) -> int:
        return self.data.stat().st_size if self.data.exists() else 0

    def read_record(self) -> dict[str, str]:
        """Return the first answer's validator (ETag or Last-Modified) and total size, if any."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def is_complete(self) -> bool:
        return self.size > 0 and str(self.size) == self.read_record().get("total")

    def range_headers(self) -> dict[str, str]:
        """Request the rest if the file is unchanged; without a validator, the whole file."""
        validator = self.read_record().get("validator")
        if not self.size or not validator:
            return {}
        return {"Range": f"bytes={self.size}-", "If-Range": validator}

    def is_continued_by(self, response: requests.Response) -> bool:
        """Whether a partial answer begins where the data ends, and is of the same file."""
        unit, _, place = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = place.partition("/")
        record = self.read_record()
        same = _validator(response) in {None, record.get("validator")}
        same = same and total in {"*", record.get("total")}
        return unit == "bytes" and span.partition("-")[0] == str(self.size) and same

    def begin(self, response: requests.Response) -> None:
        """Start over with this answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data.write_bytes(b"")
        self._write_record(_validator(response), response.headers.get("Content-Length"))

    def finish(self) -> None:
        """Record the size, which the server need not have sent, as complete."""
        self._write_record(self.read_record().get("validator"), str(self.size))

    def discard(self) -> None:
        remove_folder(self.folder)

    def _write_record(self, validator: str | None, total: str | None) -> None:
        record = {"validator": validator, "total": total}
        text = json.dumps({key: value for key, value in record.items() if value})
        self._record.write_text(text, encoding="utf-8")


def _validator(response: requests.Response) -> str | None:
    """Return what identifies this version of a file: a strong ETag, else the last change."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


@contextmanager
def downloaded(
    address: str, *, folder: Path, file_name: str, sha256: str | None, retry_policy: RetryPolicy
) -> Iterator[Path]:
    """Download a file, and keep it until the block ends.

    What an interrupted run has left in `folder` is continued. The file is kept if the block is
    interrupted or the disk is full, and removed if the block finds it broken (AlmrrError).

    Args:
        address: http:// or https:// address.
        folder: where the file is kept meanwhile.
        file_name: its name there.
        sha256: its checksum, or None if it is unknown.
        retry_policy: retries, waits and time-outs.

    Yields:
        The complete file.

    Raises:
        AlmrrError: the server has no such file or stopped answering, or the checksum differs.
        DiskError: the disk is full, or the folder cannot be written.
    """
    partial = _Partial(folder, file_name, address)
    with report_disk_errors(folder), requests.Session() as session:
        adapter = HTTPAdapter(max_retries=_retries(retry_policy))
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        _receive_checked(session, address, partial, sha256, retry_policy)
    try:
        yield partial.data
    except DiskError:
        raise
    except AlmrrError:
        partial.discard()
        raise
    partial.discard()


def _retries(retry_policy: RetryPolicy) -> urllib3.Retry:
    """Retries of what fails before the first byte: connections, and answers of a busy server."""
    return urllib3.Retry(
        total=retry_policy.attempts - 1,
        backoff_factor=retry_policy.backoff,
        status_forcelist=_BUSY,
        raise_on_status=False,
        respect_retry_after_header=False,  # some servers demand an hour; try the next address
    )


def _receive_checked(
    session: requests.Session,
    address: str,
    partial: _Partial,
    sha256: str | None,
    retry_policy: RetryPolicy,
) -> None:
    kept = partial.size
    if kept:
        logger.info("%s: continuing after %s", partial.data.name, format_amount(kept, "B"))
    _receive(session, address, partial, retry_policy)
    if sha256 and (found := hash_file(partial.data)) != sha256.lower():
        name = partial.data.name
        partial.discard()
        if not kept:
            raise AlmrrError(f"{name} has the sha256 {found}, expected was {sha256.lower()}")
        logger.warning("%s: what an earlier run has left does not fit; starting over", name)
        _receive_checked(session, address, partial, sha256, retry_policy)
    partial.finish()


def _receive(
    session: requests.Session, address: str, partial: _Partial, retry_policy: RetryPolicy
) -> None:
    """Receive what is missing; tries count only while no new bytes arrive."""
    failures, most = 0, partial.size
    while not partial.is_complete():
        try:
            return _receive_once(session, address, partial, retry_policy.timeout)
        except _BrokenOffError as error:
            failures = 1 if partial.size > most else failures + 1
            most = max(most, partial.size)
            if failures >= retry_policy.attempts:
                raise AlmrrError(f"{error}, {failures} times in a row") from error
            wait = retry_policy.backoff * 2 ** (failures - 1)
            logger.warning("%s: %s; trying again in %.0f s", redact_address(address), error, wait)
            time.sleep(wait)
    return None


def _receive_once(
    session: requests.Session, address: str, partial: _Partial, timeout: float
) -> None:
    headers = {"Accept-Encoding": "identity", **partial.range_headers()}
    try:
        response = session.get(address, headers=headers, stream=True, timeout=timeout)
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
        elif not partial.is_continued_by(response):
            partial.discard()
            raise _BrokenOffError("the file has changed since the download began")
        _write_body(response, partial)


def _write_body(response: requests.Response, partial: _Partial) -> None:
    total = partial.read_record().get("total")
    size = int(total) if total and total.isdecimal() else None
    description = f"download {partial.data.name}"
    try:
        with (
            partial.data.open("ab") as stream,
            track(size, unit="B", description=description, done=partial.size) as advance,
        ):
            for block in response.raw.stream(_BLOCK, decode_content=False):
                stream.write(block)
                advance(len(block))
    except urllib3.exceptions.HTTPError as error:
        received = format_amount(partial.size, "B")
        raise _BrokenOffError(f"the connection broke off after {received}") from error
    if size is not None and partial.size != size:
        raise _BrokenOffError(f"the connection ended after {partial.size} of {size} bytes")


def _reason(error: requests.RequestException) -> str:
    """Return why there was no answer; the libraries nest the cause several layers deep."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    cause: object = error
    while isinstance(cause, BaseException):
        inner = getattr(cause, "reason", None) or (cause.args[0] if cause.args else None)
        if not isinstance(inner, BaseException):
            break
        cause = inner
    return f"no connection ({str(cause).rpartition(': ')[2]})"
