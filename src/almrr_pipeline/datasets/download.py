"""Download of one file over HTTP, resumed after an interruption, retried and verified.

Connections, redirects and proxies are those of requests. The resuming (RFC 9110, sections 13.1.5
and 14) is written here, because neither requests nor pooch continue a broken download: pooch's
begins anew, and archives here have up to 5 GiB.
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


class _Download:
    """One address, the bytes received from it so far, and the version of the file they are of.

    `record` holds the first answer's validator (ETag or Last-Modified) and total size, if any.
    """

    def __init__(self, address: str, folder: Path, file_name: str, policy: RetryPolicy) -> None:
        self.address = address
        self.policy = policy
        key = hashlib.sha256(address.encode()).hexdigest()[:12]  # one folder per address
        self.folder = folder / key
        self.data = self.folder / file_name
        self._record_file = self.folder / "download.json"

    @property
    def size(self) -> int:
        return self.data.stat().st_size if self.data.exists() else 0

    @property
    def record(self) -> dict[str, str]:
        try:
            record = json.loads(self._record_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def write_record(self, validator: str | None, total: str | None) -> None:
        record = {"validator": validator, "total": total}
        text = json.dumps({key: value for key, value in record.items() if value})
        self._record_file.write_text(text, encoding="utf-8")

    def discard(self) -> None:
        remove_folder(self.folder)

    def receive(self, sha256: str | None) -> None:
        """Receive what is missing, and verify the file."""
        kept = self.size
        if kept:
            logger.info("%s: continuing after %s", self.data.name, format_amount(kept, "B"))
        self._receive_all()
        if sha256 and (found := hash_file(self.data)) != sha256.lower():
            self.discard()
            name = self.data.name
            if not kept:
                raise AlmrrError(f"{name} has the sha256 {found}, expected was {sha256.lower()}")
            logger.warning("%s: what an earlier run has left does not fit; starting over", name)
            self.receive(sha256)
        self.write_record(self.record.get("validator"), str(self.size))  # complete

    def _receive_all(self) -> None:
        """Try until nothing is missing; tries count only while no new bytes arrive."""
        failures, most = 0, self.size
        while not self.size or str(self.size) != self.record.get("total"):
            try:
                return self._receive_once()
            except _BrokenOffError as error:
                failures = 1 if self.size > most else failures + 1
                most = max(most, self.size)
                if failures >= self.policy.attempts:
                    raise AlmrrError(f"{error}, {failures} times in a row") from error
                wait = self.policy.backoff * 2 ** (failures - 1)
                shown = redact_address(self.address)
                logger.warning("%s: %s; trying again in %.0f s", shown, error, wait)
                time.sleep(wait)  # not a Retry-After, which may be an hour: try the next address
        return None

    def _receive_once(self) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self.size and (validator := self.record.get("validator")):
            headers |= {"Range": f"bytes={self.size}-", "If-Range": validator}
        timeout = self.policy.timeout
        try:
            response = requests.get(self.address, headers=headers, stream=True, timeout=timeout)
        except requests.Timeout as error:
            raise _BrokenOffError("no answer in time") from error
        except requests.ConnectionError as error:
            raise _BrokenOffError(f"no connection ({_first_cause(error)})") from error
        except requests.RequestException as error:
            raise AlmrrError(f"no connection ({error})") from error
        with response:
            answer = f"the server answers {response.status_code} {response.reason}"
            if response.status_code in _BUSY:
                raise _BrokenOffError(answer)
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                self.discard()
                raise _BrokenOffError("the file has become shorter")
            if not response.ok:
                raise AlmrrError(answer)
            if response.status_code != _PARTIAL_CONTENT:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.data.write_bytes(b"")
                self.write_record(_validator(response), response.headers.get("Content-Length"))
            elif not self._is_continued_by(response):
                self.discard()
                raise _BrokenOffError("the file has changed since the download began")
            self._append(response)

    def _is_continued_by(self, response: requests.Response) -> bool:
        """Whether a partial answer begins where the data ends, and is of the same file."""
        unit, _, place = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = place.partition("/")
        if unit != "bytes" or span.partition("-")[0] != str(self.size):
            return False
        same_version = _validator(response) in {None, self.record.get("validator")}
        return same_version and total in {"*", self.record.get("total")}

    def _append(self, response: requests.Response) -> None:
        total = self.record.get("total", "")
        size = int(total) if total.isdecimal() else None
        title = f"download {self.data.name}"
        try:
            with (
                self.data.open("ab") as stream,
                track(size, unit="B", description=title, done=self.size) as advance,
            ):
                for block in response.raw.stream(_BLOCK, decode_content=False):
                    stream.write(block)
                    advance(len(block))
        except urllib3.exceptions.HTTPError as error:
            received = format_amount(self.size, "B")
            raise _BrokenOffError(f"the connection broke off after {received}") from error
        if size is not None and self.size != size:
            raise _BrokenOffError(f"the connection ended after {self.size} of {size} bytes")


@contextmanager
def downloaded(
    address: str, *, folder: Path, file_name: str, sha256: str | None, retry_policy: RetryPolicy
) -> Iterator[Path]:
    """Download a file from an http(s) address, and keep it in `folder` until the block ends.

    What an interrupted run has left there is continued. The file is kept if the block is
    interrupted or the disk is full, and removed if the block finds it broken (AlmrrError).

    Yields:
        The complete file.

    Raises:
        AlmrrError: the server has no such file or stopped answering, or the checksum differs.
        DiskError: the disk is full, or the folder cannot be written.
    """
    download = _Download(address, folder, file_name, retry_policy)
    with report_disk_errors(folder):
        download.receive(sha256)
    try:
        yield download.data
    except DiskError:
        raise
    except AlmrrError:
        download.discard()
        raise
    download.discard()


def _validator(response: requests.Response) -> str | None:
    """Return what identifies this version of a file: a strong ETag, else the last change."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _first_cause(error: BaseException) -> BaseException:
    return error if error.__context__ is None else _first_cause(error.__context__)
