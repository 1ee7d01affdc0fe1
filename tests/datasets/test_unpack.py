"""Archives that nobody has to trust: all or nothing, and never anything outside."""

from __future__ import annotations

import errno
import gzip
import io
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almrr_pipeline.common.errors import AlmrrError, DiskError
from almrr_pipeline.datasets.unpack import Limits, unpack

KINDS = ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]
FILES = {"wood/train/a b é.png": b"first" * 50, "wood/test/0.png": b"", "readme.txt": b"hello"}


def packed(kind: str, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=stream, mode="w:" + kind[4:]) as archive:  # type: ignore[call-overload]
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def tar_with(info: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        before = tarfile.TarInfo("before.txt")
        archive.addfile(before, io.BytesIO())
        archive.addfile(info, io.BytesIO(b"\0" * info.size))
    return stream.getvalue()


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def save(folder: Path, content: bytes, name: str = "archive") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def assert_refused(archive: Path, work: Path, match: str, **limits: Any) -> None:
    """The archive is refused, and `work` is as it was: empty."""
    work.mkdir()
    with pytest.raises(AlmrrError, match=match) as caught:
        unpack(archive, work / "target", limits=Limits(**limits))
    assert archive.name in str(caught.value)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_all_members_arrive_whatever_the_archive_is_called(tmp_path: Path, kind: str) -> None:
    archive = save(tmp_path, packed(kind, FILES), "no suffix at all")

    unpack(archive, tmp_path / "new" / "target")

    assert files_in(tmp_path / "new" / "target") == FILES
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["target"]


def test_folders_and_leading_dots_are_taken_as_meant(tmp_path: Path) -> None:
    info = tarfile.TarInfo("./wood/empty")
    info.type = tarfile.DIRTYPE

    unpack(save(tmp_path, tar_with(info)), tmp_path / "target")

    assert (tmp_path / "target" / "wood" / "empty").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_permissions_of_an_archive_are_not_taken_over(tmp_path: Path) -> None:
    info = tarfile.TarInfo("tool")
    info.mode = 0o6777

    unpack(save(tmp_path, tar_with(info)), tmp_path / "target")

    assert (tmp_path / "target" / "tool").stat().st_mode & 0o7111 == 0


def test_what_a_killed_run_has_left_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / ".unpacking-target", b"half", "half.png")

    unpack(save(tmp_path, packed("zip", FILES)), tmp_path / "target")

    assert files_in(tmp_path / "target") == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "target"]


OUTSIDE = [
    "../outside",
    "a/../../outside",
    "/outside",
    "C:/outside",
    "C:outside",
    "..\\outside",
    "\\\\host\\share\\x",
]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_outside_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    archive = save(tmp_path, packed(kind, {"first.txt": b"1", name: b"evil"}))

    assert_refused(archive, tmp_path / "work", "leads out of its folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "work"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("innocent.png")
    info.type = kind
    info.linkname = "before.txt"

    assert_refused(
        save(tmp_path, tar_with(info)), tmp_path / "work", "'innocent.png', a link or a device"
    )


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o010666], ids=["link", "device", "pipe"])
def test_links_and_devices_in_a_zip_are_refused(tmp_path: Path, mode: int) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        info = zipfile.ZipInfo("innocent.png")
        info.create_system = 3
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")

    assert_refused(
        save(tmp_path, stream.getvalue()), tmp_path / "work", "'innocent.png', a link or a device"
    )


@pytest.mark.parametrize("kind", KINDS[0:1] + KINDS[2:])
def test_an_archive_bomb_is_refused(tmp_path: Path, kind: str) -> None:
    archive = save(tmp_path, packed(kind, {"bomb": bytes(4 << 20)}))

    assert_refused(archive, tmp_path / "work", r"unpacks to more than 1 MiB", allowance=1 << 20)


def sparse_tar(kind: str, size: int) -> bytes:
    """A tar of one file without content, all of whose `size` bytes are a hole."""
    info = tarfile.TarInfo("bomb.png")
    if kind == "pax":
        info.pax_headers = {"GNU.sparse.map": f"{size},0", "GNU.sparse.size": str(size)}
        return tar_with(info)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = header[483:495] = (
        b"%011o\0" % size
    )  # where the only block of data would begin, and the real size
    header[398:410] = b"%011o\0" % 0
    header[148:156] = b" " * 8  # counts as spaces in its own sum
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(2 * tarfile.BLOCKSIZE)


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_sparse_file_which_needs_no_bytes_in_the_archive_is_refused(
    tmp_path: Path, kind: str
) -> None:
    archive = save(tmp_path, sparse_tar(kind, 4 << 20))
    with tarfile.open(archive) as opened:
        assert opened.getmembers()[-1].size == 4 << 20

    assert_refused(
        archive,
        tmp_path / "work",
        r"'bomb\.png', a link or a device or a sparse file",
        allowance=1 << 20,
    )


def test_a_bomb_in_a_header_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 64 << 20
    archive = save(tmp_path, gzip.compress(header.tobuf() + bytes(64 << 20)))

    assert_refused(
        archive, tmp_path / "work", "unpacks to more than 1 MiB", allowance=1 << 20, ratio=1.0
    )


def test_a_bomb_behind_the_last_member_is_refused(tmp_path: Path) -> None:
    archive = save(tmp_path, gzip.compress(packed("tar", FILES) + bytes(8 << 20)))

    assert_refused(archive, tmp_path / "work", "unpacks to more than 1 MiB", allowance=1 << 20)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_too_large_an_archive_is_refused(tmp_path: Path, kind: str) -> None:
    archive = save(tmp_path, packed(kind, {"a": bytes(30_000), "b": bytes(30_000)}))

    assert_refused(archive, tmp_path / "work", "unpacks to more than 48.83 KiB", size=50_000)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_too_many_files_are_refused(tmp_path: Path, kind: str) -> None:
    archive = save(tmp_path, packed(kind, {str(number): b"" for number in range(11)}))

    assert_refused(archive, tmp_path / "work", "more than 10 files", files=10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_archive_is_refused(tmp_path: Path, kind: str, fraction: float) -> None:
    whole = packed(kind, {str(number): bytes([number]) * 300 for number in range(9)})

    end = len(
        whole.rstrip(b"\0")
    )  # a tar without some of the zeros behind its last member is whole
    archive = save(tmp_path, whole[: int(fraction * end)])

    assert_refused(archive, tmp_path / "work", "is truncated or broken")


def test_a_tar_that_was_cut_between_two_members_is_refused(tmp_path: Path) -> None:
    whole = packed("tar", {"a": b"1" * 512, "b": b"2" * 512})

    assert_refused(
        save(tmp_path, whole[:1024]), tmp_path / "work", "the end of the tar file is missing"
    )


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_one_wrong_byte_is_noticed_by_the_checksum_inside(tmp_path: Path, kind: str) -> None:
    whole = bytearray(packed(kind, {"a": bytes(range(256)) * 40}))
    whole[len(whole) // 2 if kind != "zip" else 60] ^= 0xFF

    assert_refused(save(tmp_path, bytes(whole)), tmp_path / "work", "is truncated or broken")


def test_a_web_page_instead_of_an_archive_is_shown(tmp_path: Path) -> None:
    archive = save(tmp_path, b"<!DOCTYPE html><title>Please log in</title>" * 40)

    assert_refused(archive, tmp_path / "work", "begins with b'<!DOCTYPE html><title>Pl'")


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(tmp_path: Path, kind: str) -> None:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a", "1")
            archive.writestr("a", "2")
    else:
        stream.write(tar_with(tarfile.TarInfo("before.txt")))

    assert_refused(
        save(tmp_path, stream.getvalue()), tmp_path / "work", "twice, or as a file and a folder"
    )


def test_a_name_that_is_a_file_and_a_folder_is_refused(tmp_path: Path) -> None:
    archive = save(tmp_path, packed("zip", {"a": b"1", "a/b": b"2"}))

    assert_refused(archive, tmp_path / "work", "twice, or as a file and a folder")


def test_a_locked_zip_is_refused(tmp_path: Path) -> None:
    locked = bytearray(packed("zip", {"a": b"1"}))
    for signature, place in (
        (b"PK\x03\x04", 6),
        (b"PK\x01\x02", 8),
    ):  # the flag "encrypted" in both headers
        locked[locked.index(signature) + place] |= 1

    assert_refused(
        save(tmp_path, bytes(locked)), tmp_path / "work", "is truncated or broken .*password"
    )


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as archive:
        archive.addfile(tarfile.TarInfo("gr\xfcn.png"), io.BytesIO())

    assert_refused(save(tmp_path, stream.getvalue()), tmp_path / "work", "not UTF-8 text")


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.zip", tmp_path / "work", "There is no archive")


@pytest.mark.parametrize("kind", ["zip", "tar.xz"])
def test_an_interruption_leaves_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = save(tmp_path, packed(kind, FILES))
    work = tmp_path / "work"
    work.mkdir()
    interrupt_copying(monkeypatch, KeyboardInterrupt())

    with pytest.raises(KeyboardInterrupt):
        unpack(archive, work / "target")
    assert list(work.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = save(tmp_path, packed("zip", FILES))
    work = tmp_path / "work"
    work.mkdir()
    interrupt_copying(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))

    with pytest.raises(DiskError, match="The disk is full"):
        unpack(archive, work / "target")
    assert list(work.iterdir()) == []


def interrupt_copying(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the copy of the second member fail after some bytes."""
    copied: list[IO[bytes]] = []
    original = shutil.copyfileobj

    def copy(stream: IO[bytes], target: IO[bytes], size: int = 0) -> None:
        copied.append(target)
        if len(copied) == 2:
            target.write(b"half")
            raise error
        original(stream, target, size)

    monkeypatch.setattr(shutil, "copyfileobj", copy)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 256 KiB; needs the right to mount one."""
    folder = Path(tempfile.mkdtemp(prefix="almrr-small-disk-"))
    mount = shutil.which("mount")
    mounted = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if not mounted or mounted.returncode:
        folder.rmdir()
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_really_full_leaves_nothing(
    tmp_path: Path, small_disk: Path, kind: str
) -> None:
    archive = save(tmp_path, packed(kind, {"a": b"1" * 100_000, "b": b"2" * 400_000}))

    with pytest.raises(DiskError, match=f"The disk is full: {small_disk}"):
        unpack(archive, small_disk / "target")
    assert list(small_disk.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_named(
    pack_readable: Path, read_only_folder: Path
) -> None:
    with pytest.raises(DiskError, match=rf"{read_only_folder}.* cannot be written"):
        unpack(pack_readable, read_only_folder / "target")


@pytest.fixture
def pack_readable() -> Iterator[Path]:
    """An archive that everybody may read."""
    folder = Path(tempfile.mkdtemp(prefix="almrr-archive-"))
    folder.chmod(0o755)
    yield save(folder, packed("zip", FILES))
    shutil.rmtree(folder)


NAMES = st.one_of(
    st.sampled_from(
        [
            "a",
            "a/b",
            "a/b/c.png",
            "./a",
            "a//b",
            ".",
            "..",
            "a/..",
            "/",
            "",
            "a\\b",
            "C:x",
            "é",
            "a b",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
TAR_TYPES = [
    tarfile.REGTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.FIFOTYPE,
]


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """An archive of any members, honest or not."""
    members = draw(
        st.lists(st.tuples(NAMES, st.binary(max_size=60), st.sampled_from(TAR_TYPES)), max_size=5)
    )
    stream = io.BytesIO()
    if draw(st.booleans()):
        with zipfile.ZipFile(stream, "w") as archive:
            for name, content, _ in members:
                archive.writestr(zipfile.ZipInfo(name), content)
    else:
        mode = draw(st.sampled_from(["w:", "w:gz", "w:bz2", "w:xz"]))
        with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
            for name, content, kind in members:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "a"
                info.size = len(content) if kind == tarfile.REGTYPE else 0
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def assert_all_or_nothing(content: bytes, whole: Callable[[Path], None] = lambda _: None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        archive = save(Path(folder), content)
        try:
            unpack(archive, work / "target", limits=Limits(allowance=1 << 20))
        except AlmrrError as error:
            assert "archive" in str(error)  # noqa: PT017 (both ends are allowed)
            assert list(work.iterdir()) == []
        else:
            assert [path.name for path in work.iterdir()] == ["target"]
        assert sorted(path.name for path in Path(folder).iterdir()) == ["archive", "work"]
        assert not any(path.is_symlink() for path in work.rglob("*"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(archives())
@settings(max_examples=80, deadline=None)
def test_any_members_end_in_files_or_a_clear_error(content: bytes) -> None:
    assert_all_or_nothing(content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(st.sampled_from(KINDS), st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_archives_end_in_files_or_a_clear_error(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(packed(kind, FILES))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    assert_all_or_nothing(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


def test_a_zip_that_lies_about_sizes_cannot_write_more(tmp_path: Path) -> None:
    content = bytearray(packed("zip", {"a": bytes(2 << 20)}))
    for signature, place in (
        (b"PK\x03\x04", 22),
        (b"PK\x01\x02", 24),
    ):  # the uncompressed size in both headers
        struct.pack_into("<I", content, content.index(signature) + place, 10)

    assert_refused(
        save(tmp_path, bytes(content)), tmp_path / "work", r"truncated or broken|unpacks to more"
    )


@pytest.mark.parametrize("system", [0, 10, 14])
def test_a_zip_of_windows_may_separate_by_backslashes(tmp_path: Path, system: int) -> None:
    """As .NET packed before version 4.6.1."""
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        for name in ("tiles\\train\\", "tiles\\train\\good\\0.png"):
            info = zipfile.ZipInfo(name)
            info.create_system = system
            archive.writestr(info, b"" if name.endswith("\\") else b"first")

    unpack(tmp_path / "old.zip", tmp_path / "out")

    assert (tmp_path / "out/tiles/train/good/0.png").read_bytes() == b"first"


@pytest.mark.parametrize(
    "name", ["..\\outside", "a\\..\\..\\x", "\\x", "C:\\x", "\\\\host\\share\\x"]
)
def test_backslashes_of_windows_do_not_lead_out_either(tmp_path: Path, name: str) -> None:
    info = zipfile.ZipInfo(name)
    info.create_system = 0
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        archive.writestr(info, b"first")

    with pytest.raises(AlmrrError, match="leads out of its folder"):
        unpack(tmp_path / "old.zip", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.zip"]


class _Unflagged(zipfile.ZipInfo):
    """A member whose name is written as it is encoded, without the flag for UTF-8."""

    encoding = "utf-8"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 - zipfile's
        return self.filename.encode(self.encoding), self.flag_bits & ~0x800


@pytest.mark.parametrize(
    ("encoding", "found", "warns"),
    [("utf-8", "Prüfling/0.png", False), ("cp437", "Prüfling/0.png", True), ("cp1252", None, True)],
)
def test_names_of_a_zip_without_their_encoding(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    encoding: str,
    found: str | None,
    warns: bool,
) -> None:
    info = _Unflagged("Prüfling/0.png")
    info.encoding = encoding
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, b"first")

    unpack(tmp_path / "a.zip", tmp_path / "out")

    if found:
        assert (tmp_path / "out" / found).read_bytes() == b"first"
    assert ("a.zip: the encoding of 1 names is not stated" in caplog.text) == warns
