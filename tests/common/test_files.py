"""What is written is complete or absent, and what is hashed, moved and copied is what was there."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from almrr_pipeline.common import files
from almrr_pipeline.common.errors import AlmrrError, DiskError
from almrr_pipeline.common.files import (
    check_target_file,
    hash_file,
    move_folder_into_place,
    staging_folder,
    transfer,
    write_atomically,
)


def filled(folder: Path, text: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "text").write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")

    with write_atomically(tmp_path / "a.json") as partial:
        partial.write_text("new")
        assert (tmp_path / "a.json").read_text() == "old"
        assert partial.parent == tmp_path
        assert partial.suffix == ".json"  # np.save and others add one that is missing

    assert (tmp_path / "a.json").read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")

    def fail() -> None:
        with write_atomically(tmp_path / "a.json") as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert (tmp_path / "a.json").read_text() == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "is full"), (errno.EROFS, "written")])
def test_a_disk_that_refuses_is_named_in_a_sentence(
    tmp_path: Path, code: int, message: str
) -> None:
    with pytest.raises(DiskError, match=message), write_atomically(tmp_path / "a.json"):
        raise OSError(code, os.strerror(code))


def test_an_array_that_a_disk_takes_half_of_is_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="The disk is full"), write_atomically(tmp_path / "a.npy"):
        raise OSError("16384 requested and 10208 written")


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "is a folder"), ("/dev/null", "is a device"), (os.fsdecode(b"\xff.pt2"), "not UTF-8")],
)
def test_what_no_finished_file_may_replace_is_named(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(AlmrrError, match=said):
        check_target_file(tmp_path / name)
    check_target_file(tmp_path / "Prüfling.pt2")


def test_a_staging_folder_is_new_and_open_to_others(tmp_path: Path) -> None:
    with (
        staging_folder(tmp_path / "scratch") as first,
        staging_folder(tmp_path / "scratch") as second,
    ):
        assert first != second
        assert first.parent == tmp_path / "scratch"
        assert names(first) == []
        assert first.stat().st_mode & 0o777 == 0o755

    assert first.is_dir()


def test_a_staging_folder_is_one_of_its_parents_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tempfile.mkdtemp  # relative before Python 3.12, absolute from then on
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **options: str(Path(make(**options)).resolve()))
    monkeypatch.chdir(tmp_path)
    with staging_folder(Path("results")) as folder:
        assert list(Path("results").iterdir()) == [folder]


def test_a_staging_folder_is_removed_when_its_filling_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with staging_folder(tmp_path) as folder:
            filled(folder / "a", "half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "expected"), [(errno.ENOSPC, DiskError), (errno.EACCES, PermissionError)]
)
def test_only_a_full_disk_is_reported_for_what_fills_a_staging_folder(
    tmp_path: Path, code: int, expected: type[Exception]
) -> None:
    with pytest.raises(expected), staging_folder(tmp_path):
        raise OSError(code, os.strerror(code))  # EACCES may be of a file that is read

    assert names(tmp_path) == []


def test_what_killed_processes_have_left_is_swept_but_not_what_runs(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    killed = filled(tmp_path / f".staging@{host}@{ended.pid}@abc", "half")
    running = filled(tmp_path / f".staging@{host}@{os.getpid()}@abc", "half")
    elsewhere = filled(tmp_path / f".staging@{host}2@{ended.pid}@abc", "half")

    with staging_folder(tmp_path):
        assert not killed.exists()
        assert running.exists()
        assert elsewhere.exists()


def test_a_moved_folder_replaces_the_older_one(tmp_path: Path) -> None:
    target = filled(tmp_path / "results" / "target", "old")
    (target / "stale").write_text("")

    move_folder_into_place(filled(tmp_path / "staged", "new"), target)

    assert (target / "deep" / "text").read_text() == "new"
    assert names(target) == ["deep"]
    assert names(tmp_path) == ["results"]


def test_a_folder_on_another_disk_is_copied_and_then_renamed(tmp_path: Path) -> None:
    if (
        not os.access("/dev/shm", os.W_OK)
        or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev
    ):
        pytest.skip("this machine has no second disk that can be written")
    target = filled(tmp_path / "target", "old")
    filled(tmp_path / ".target.partial", "half")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        move_folder_into_place(filled(Path(other) / "staged", "new"), target)
        assert names(Path(other)) == []

    assert (target / "deep" / "text").read_text() == "new"
    assert names(tmp_path) == ["target"]


def test_a_hash_is_that_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)

    small = hash_file(tmp_path / "a")
    monkeypatch.setattr(files, "_HASHED_WITHOUT_PROGRESS", 0)

    assert small == hash_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_only_large_files_show_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    (tmp_path / "a").write_bytes(b"content")

    hash_file(tmp_path / "a")
    assert terminal.getvalue() == ""
    monkeypatch.setattr(files, "_HASHED_WITHOUT_PROGRESS", 0)
    hash_file(tmp_path / "a")
    assert "checksum of a" in terminal.getvalue()


def test_a_copy_leaves_hidden_files_and_the_original_alone(tmp_path: Path) -> None:
    filled(tmp_path / "a", "text")
    (tmp_path / "a" / "._text").write_text("hidden")

    transfer([tmp_path / "a"], tmp_path / "target", move=False)

    assert (tmp_path / "target" / "a" / "deep" / "text").read_text() == "text"
    assert names(tmp_path / "target" / "a") == ["deep"]
    assert names(tmp_path / "a") == ["._text", "deep"]
