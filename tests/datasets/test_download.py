"""One file over HTTP, from a server with every fault that servers have."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from almrr_pipeline.common.errors import AlmrrError, DiskError
from almrr_pipeline.datasets.base import RetryPolicy
from almrr_pipeline.datasets.download import downloaded

CONTENT = np.random.default_rng(0).bytes(300_000)
HALF = len(CONTENT) // 2
OTHER = np.random.default_rng(1).bytes(280_000)


def fetch(
    address: str,
    folder: Path,
    *,
    sha256: str | None = None,
    attempts: int = 3,
    timeout: float = 5.0,
) -> bytes:
    retry_policy = RetryPolicy(attempts=attempts, backoff=0.0, timeout=timeout)
    with downloaded(
        address, folder=folder, file_name="a.zip", sha256=sha256, retry_policy=retry_policy
    ) as path:
        assert path.name == "a.zip"
        return path.read_bytes()


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def interrupt(address: str, folder: Path, server: Any, at: int = HALF) -> None:
    """Leave the first `at` bytes in the folder, as a run that was stopped there does."""
    answer = server.answers["/a.zip"]
    answer.drops[:] = [at]
    with pytest.raises(AlmrrError):
        fetch(address, folder, attempts=1)
    server.requests.clear()


def test_a_file_arrives_whole_and_is_gone_when_the_work_is_done(
    server: Any, tmp_path: Path
) -> None:
    assert fetch(server.serve("a.zip", CONTENT), tmp_path, sha256=sha256_of(CONTENT)) == CONTENT
    assert kept(tmp_path) == []


def test_a_dropped_connection_goes_on_where_it_broke_off(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", CONTENT, drops=[HALF, 1000])

    assert fetch(address, tmp_path) == CONTENT
    assert [wanted for _, wanted in server.requests] == [
        None,
        f"bytes={HALF}-",
        f"bytes={HALF + 1000}-",
    ]


def test_a_server_without_range_is_asked_for_all_of_it_again(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", CONTENT, drops=[HALF], ranges=False)

    assert fetch(address, tmp_path) == CONTENT


def test_a_stopped_run_is_continued_by_the_next(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", CONTENT)
    interrupt(address, tmp_path, server)

    assert fetch(address, tmp_path) == CONTENT
    assert server.requests == [("/a.zip", f"bytes={HALF}-")]


@pytest.mark.parametrize(
    "if_range", [True, False], ids=["server heeds If-Range", "server sends the wrong part"]
)
def test_a_file_that_changed_meanwhile_is_not_glued_together(
    server: Any, tmp_path: Path, if_range: bool
) -> None:
    address = server.serve("a.zip", CONTENT)
    interrupt(address, tmp_path, server)
    server.serve("a.zip", OTHER, etag='"second"', if_range=if_range)

    assert fetch(address, tmp_path) == OTHER


def test_a_changed_file_is_noticed_by_its_size_where_no_version_is_sent(
    server: Any, tmp_path: Path
) -> None:
    address = server.serve("a.zip", CONTENT)
    interrupt(address, tmp_path, server)
    server.serve("a.zip", OTHER, etag=None, if_range=False)

    assert fetch(address, tmp_path) == OTHER


def test_a_file_that_became_shorter_than_the_part_is_fetched_anew(
    server: Any, tmp_path: Path
) -> None:
    address = server.serve("a.zip", CONTENT)
    interrupt(address, tmp_path, server)
    server.serve("a.zip", b"short", etag='"second"')
    server.answers["/a.zip"].statuses.append(416)

    assert fetch(address, tmp_path) == b"short"


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_version_a_part_is_not_trusted(
    server: Any, tmp_path: Path, etag: str | None
) -> None:
    address = server.serve("a.zip", CONTENT, etag=etag)
    interrupt(address, tmp_path, server)

    assert fetch(address, tmp_path) == CONTENT
    assert server.requests == [("/a.zip", None)]


def test_the_time_of_the_last_change_serves_as_version(server: Any, tmp_path: Path) -> None:
    changed = {"Last-Modified": "Mon, 02 Mar 2026 10:00:00 GMT"}
    address = server.serve("a.zip", CONTENT, etag=None, headers=changed, if_range=False)
    interrupt(address, tmp_path, server)

    assert fetch(address, tmp_path) == CONTENT
    assert server.requests == [("/a.zip", f"bytes={HALF}-")]


def test_a_wrong_checksum_names_both_and_keeps_nothing(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", OTHER)

    with pytest.raises(AlmrrError, match=f"{sha256_of(OTHER)}.*{sha256_of(CONTENT)}"):
        fetch(address, tmp_path, sha256=sha256_of(CONTENT))
    assert kept(tmp_path) == []


def test_a_spoilt_part_is_thrown_away_once_the_checksum_tells(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", CONTENT)
    interrupt(address, tmp_path, server)
    part = next(path for path in kept(tmp_path) if path.name == "a.zip")
    part.write_bytes(b"\0" * HALF)

    assert fetch(address, tmp_path, sha256=sha256_of(CONTENT)) == CONTENT
    assert server.requests == [("/a.zip", f"bytes={HALF}-"), ("/a.zip", None)]


def test_a_checksum_may_be_written_in_capitals(server: Any, tmp_path: Path) -> None:
    assert (
        fetch(server.serve("a.zip", CONTENT), tmp_path, sha256=sha256_of(CONTENT).upper())
        == CONTENT
    )


def test_a_busy_server_is_asked_again(server: Any, tmp_path: Path) -> None:
    assert fetch(server.serve("a.zip", CONTENT, statuses=[503, 500]), tmp_path) == CONTENT


def test_a_server_that_stays_busy_is_given_up(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", CONTENT, statuses=[503] * 9)

    with pytest.raises(AlmrrError, match="the server answers 503"):
        fetch(address, tmp_path, attempts=3)
    assert len(server.requests) == 3


def test_a_missing_file_is_not_asked_for_twice(server: Any, tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match="the server answers 404"):
        fetch(f"{server.base}/a.zip", tmp_path)
    assert len(server.requests) == 1


def test_tries_count_only_while_nothing_new_arrives(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", CONTENT, drops=[10_000] * 20)

    assert fetch(address, tmp_path, attempts=2) == CONTENT


def test_a_connection_that_always_breaks_off_is_given_up_and_its_part_kept(
    server: Any, tmp_path: Path
) -> None:
    address = server.serve("a.zip", CONTENT, always_drops=HALF, ranges=False)

    with pytest.raises(AlmrrError, match=r"broke off after .* 3 times in a row"):
        fetch(address, tmp_path, attempts=3)
    assert max(path.stat().st_size for path in kept(tmp_path)) == HALF


def test_nobody_at_the_address_is_said_in_plain_words(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

    with pytest.raises(AlmrrError, match=r"^no connection \(.*refused"):
        fetch(f"http://127.0.0.1:{port}/a.zip", tmp_path)


def test_a_silent_server_is_given_up(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", CONTENT, silence=3.0)

    with pytest.raises(AlmrrError, match=r"no answer in time|timed out"):
        fetch(address, tmp_path, attempts=1, timeout=0.2)


def test_an_answer_without_a_length_is_taken_to_its_end(server: Any, tmp_path: Path) -> None:
    assert fetch(server.serve("a.zip", CONTENT, says_length=False), tmp_path) == CONTENT


def test_a_redirect_is_followed(server: Any, tmp_path: Path) -> None:
    there = server.serve("there.zip", CONTENT)

    assert fetch(server.serve("a.zip", redirect=there), tmp_path) == CONTENT


def test_what_is_compressed_stays_compressed(server: Any, tmp_path: Path) -> None:
    address = server.serve(
        "a.zip", CONTENT, headers={"Content-Encoding": "gzip"}
    )  # as some servers say of a .tar.gz

    assert fetch(address, tmp_path) == CONTENT


def test_a_complete_file_survives_an_interruption_of_the_work_after_it(
    server: Any, tmp_path: Path
) -> None:
    address = server.serve("a.zip", CONTENT, says_length=False)
    with (
        pytest.raises(KeyboardInterrupt),
        downloaded(
            address, folder=tmp_path, file_name="a.zip", sha256=None, retry_policy=RetryPolicy()
        ),
    ):
        raise KeyboardInterrupt
    server.requests.clear()

    assert fetch(address, tmp_path) == CONTENT
    assert server.requests == []


@pytest.mark.parametrize(("error", "files"), [(DiskError("full"), 2), (AlmrrError("broken"), 0)])
def test_a_file_is_kept_for_a_full_disk_but_not_when_it_is_broken(
    server: Any, tmp_path: Path, error: AlmrrError, files: int
) -> None:
    address = server.serve("a.zip", CONTENT)
    with (
        pytest.raises(AlmrrError),
        downloaded(
            address, folder=tmp_path, file_name="a.zip", sha256=None, retry_policy=RetryPolicy()
        ),
    ):
        raise error

    assert len(kept(tmp_path)) == files


def test_two_addresses_never_add_to_the_same_part(server: Any, tmp_path: Path) -> None:
    address = server.serve("a.zip", CONTENT)
    interrupt(address, tmp_path, server)

    assert fetch(server.serve("b.zip", OTHER), tmp_path) == OTHER
    assert server.requests == [("/b.zip", None)]


def test_a_folder_that_may_not_be_written_is_named(server: Any, read_only_folder: Path) -> None:
    address = server.serve("a.zip", CONTENT)

    with pytest.raises(DiskError, match=rf"{read_only_folder}.* cannot be written"):
        fetch(address, read_only_folder)
