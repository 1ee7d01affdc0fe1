"""Every row of the table in docs/data.md: one clear sentence, and the state before it."""

from __future__ import annotations

import errno
import hashlib
import io
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError, DiskError
from almrr_pipeline.config import BackboneSettings
from almrr_pipeline.datasets import obtain, unpack
from almrr_pipeline.datasets.registry import check_request, dataset_for
from almrr_pipeline.datasets.weights import check_backbone

Pack = Callable[..., bytes]


class Wood:
    """The category mvtec_wood on the server: drawn, spoilt as a test wishes, packed and fetched."""

    def __init__(self, server: Any, draw: Any, pack: Pack, workplace: Any, folder: Path) -> None:
        self.server, self.draw, self.workplace = server, draw, workplace
        self.folder = draw.mvtec(folder)
        self._pack = pack

    def packed(self) -> bytes:
        return self._pack(self.folder, "tar.xz", inside="wood")

    def fetch(self, content: bytes | None = None, *, sha256: str = "", **faults: Any) -> Any:
        """Fetch from the server alone: neither the mirror nor the bundle has it."""
        address = self.server.serve(
            "wood.tar.xz", self.packed() if content is None else content, **faults
        )
        return self.fetch_from([address], sha256)

    def fetch_from(self, addresses: list[str], sha256: str = "") -> Any:
        request = self.workplace.request(
            addresses={"mvtec_wood": addresses, "mvtec_ad": []}, sha256={"mvtec_wood": sha256}
        )
        return self.workplace.fetch("mvtec_wood", request)

    def refuse(self, said: str, content: bytes | None = None, **changes: Any) -> str:
        """Fetch, see it refused in one sentence, and find nothing that was not there before."""
        with pytest.raises(AlmrrError, match=said) as caught:
            self.fetch(content, **changes)
        assert self.workplace.leftovers() == []
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def wood(server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path) -> Wood:
    return Wood(server, draw, pack, workplace, tmp_path / "wood")


def test_the_archive_without_a_fault_is_taken(wood: Wood) -> None:
    content = wood.packed()

    assert len(wood.fetch(content, sha256=hashlib.sha256(content).hexdigest())) == 9


def test_truncated_archive(wood: Wood) -> None:
    content = wood.packed()

    wood.refuse(r"wood\.tar\.xz is truncated or broken", content[: len(content) // 2])


def test_wrong_checksum(wood: Wood) -> None:
    content = wood.packed()
    found = hashlib.sha256(content).hexdigest()

    wood.refuse(
        rf"wood\.tar\.xz has the sha256 {found}, expected was {'0' * 64}", content, sha256="0" * 64
    )


def test_server_without_range(wood: Wood) -> None:
    assert len(wood.fetch(ranges=False, drops=[1000])) == 9
    assert [wanted for _, wanted in wood.server.requests] == [None, "bytes=1000-"]


def test_connection_dropped_half_way(wood: Wood) -> None:
    assert len(wood.fetch(drops=[1000, 500])) == 9
    assert [wanted for _, wanted in wood.server.requests] == [None, "bytes=1000-", "bytes=1500-"]


def test_not_found_at_any_address(wood: Wood) -> None:
    addresses = [f"{wood.server.base}/{place}/wood.tar.xz" for place in ("one", "two")]

    with pytest.raises(AlmrrError) as caught:
        wood.fetch_from(addresses)
    assert str(caught.value) == (
        f"mvtec_wood could not be fetched: {addresses[0]} (the server answers 404 Not Found); "
        f"{addresses[1]} (the server answers 404 Not Found). Add another address to "
        "data.addresses.mvtec_wood, or download wood.tar.xz or mvtec_anomaly_detection.tar.xz by "
        "hand and set data.paths.mvtec_wood or data.paths.mvtec_ad to its path."
    )
    assert wood.workplace.leftovers() == []


def test_disk_full_while_unpacking(wood: Wood, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nothing(stream: IO[bytes], target: IO[bytes], size: int = 0) -> None:
        target.write(stream.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", write_nothing)
        with pytest.raises(
            DiskError, match=r"The disk is full: .* Free some space and run again\."
        ):
            wood.fetch()
    kept = wood.workplace.leftovers()
    assert [Path(name).name for name in kept] == ["download.json", "wood.tar.xz"]
    wood.server.requests.clear()

    assert len(wood.fetch()) == 9  # and what had arrived is not fetched again
    assert wood.server.requests == []


def with_member(wood: Wood, info: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        archive.add(wood.folder, "wood")
        archive.addfile(info, io.BytesIO(b"\0" * info.size))
    return stream.getvalue()


def test_path_traversal(wood: Wood) -> None:
    info = tarfile.TarInfo("wood/../../../evil.png")
    info.size = 4

    wood.refuse(
        r"'wood/\.\./\.\./\.\./evil\.png', which leads out of its folder", with_member(wood, info)
    )
    assert not list(wood.workplace.root.parent.rglob("evil.png"))


def test_link_in_an_archive(wood: Wood) -> None:
    info = tarfile.TarInfo("wood/train/good/link.png")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"

    wood.refuse(r"'wood/train/good/link\.png', a link or a device", with_member(wood, info))


def test_archive_bomb(wood: Wood) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wood/train/good/000.png", bytes(80 << 20))

    wood.refuse(
        "unpacks to more than 64 MiB, which no honest archive of its size does", stream.getvalue()
    )


def test_too_many_files(wood: Wood, monkeypatch: pytest.MonkeyPatch) -> None:
    original = unpack.unpack
    few = unpack.Limits(files=5)
    monkeypatch.setattr(
        obtain, "unpack", lambda archive, target: original(archive, target, limits=few)
    )

    wood.refuse("holds more than 5 files")


def test_page_instead_of_an_archive(wood: Wood) -> None:
    wood.refuse(
        "neither a zip nor a tar file and begins with b'<html>Please log in'",
        b"<html>Please log in",
    )


def test_archive_of_something_else(wood: Wood) -> None:
    shutil.rmtree(wood.folder / "train")

    wood.refuse("there is no wood/train/good in it")


def test_zero_byte_image(wood: Wood) -> None:
    (wood.folder / "train" / "good" / "001.png").write_bytes(b"")

    wood.refuse(r"^train/good/001\.png is an empty file, not an image; replace or remove it\.$")


def test_text_renamed_to_png(wood: Wood) -> None:
    (wood.folder / "test" / "good" / "001.png").write_text("not an image")

    wood.refuse(
        r"^test/good/001\.png cannot be read as an image \(it is not an image\); "
        r"replace or remove it\.$"
    )


def test_truncated_image(wood: Wood) -> None:
    path = wood.folder / "test" / "cut" / "001.png"
    path.write_bytes(path.read_bytes()[:200])

    wood.refuse(r"^test/cut/001\.png cannot be read as an image")


def test_mask_of_another_size(wood: Wood) -> None:
    wood.draw.mask(wood.folder / "ground_truth" / "cut" / "001_mask.png", (20, 16))

    wood.refuse(
        r"^ground_truth/cut/001_mask\.png has 16 x 20 pixels, "
        r"its image test/cut/001\.png has 20 x 16; "
        r"a mask has the size of its image\.$"
    )


def test_missing_mask(wood: Wood) -> None:
    (wood.folder / "ground_truth" / "cut" / "001_mask.png").unlink()

    wood.refuse(
        r"^test/cut/001\.png is defective, but its mask "
        r"ground_truth/cut/001_mask\.png is not there"
    )


def test_no_masks_at_all(wood: Wood) -> None:
    shutil.rmtree(wood.folder / "ground_truth")

    wood.refuse(r"^test/cut/000\.png is defective, but its mask")


def test_duplicate_between_train_and_test(wood: Wood) -> None:
    Image.open(wood.folder / "train" / "good" / "002.png").save(
        wood.folder / "test" / "good" / "001.png", optimize=True
    )

    wood.refuse(
        r"in train and in test: train/good/002\.png and test/good/001\.png; "
        r"remove one of each pair\.$"
    )


def test_specimen_in_two_splits(draw: Any, workplace: Any, tmp_path: Path) -> None:
    folder = draw.mvtec(tmp_path / "sheets")
    (folder / "specimens.csv").write_text(
        "image,specimen\ntrain/good/002.png,sheet 7\ntest/good/001.png,sheet 7\n"
    )

    with pytest.raises(
        AlmrrError,
        match=r"specimen are in train and in test: train/good/002\.png and test/good/001\.png; "
        r"keep each specimen",
    ):
        workplace.fetch("folder_sheets", workplace.request(paths={"folder_sheets": str(folder)}))
    assert workplace.leftovers() == []


def test_names_with_spaces_and_other_letters(wood: Wood) -> None:
    for path in (wood.folder / "train" / "good").iterdir():
        path.rename(path.with_name(f"Größe {path.stem} 面.png"))

    manifest = wood.fetch()

    assert manifest["image"].str.contains("Größe 000 面.png", regex=False).sum() == 1


def test_read_only_target(draw: Any, workplace: Any, read_only_folder: Path, mirror: Path) -> None:
    with pytest.raises(
        DiskError, match=rf"{read_only_folder}.* cannot be written \(Permission denied\)"
    ):
        dataset_for("nanotwice").fetch(
            "nanotwice",
            target=read_only_folder,
            request=workplace.request(mirror=str(mirror)),
        )
    assert list(read_only_folder.iterdir()) == []


@pytest.fixture
def mirror(draw: Any) -> Iterator[Path]:
    """A mirror with NanoTWICE that everybody may read, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp(prefix="almrr-mirror-"))
    draw.nanotwice(folder / "nanotwice", anomalous=2)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_empty_category(wood: Wood) -> None:
    for path in (wood.folder / "train" / "good").iterdir():
        path.unlink()
    (wood.folder / "train" / "good" / "notes.txt").write_text("the images went missing")

    wood.refuse("mvtec_wood: there is no normal image to train on")


def test_other_counts_where_strict(wood: Wood) -> None:
    request = wood.workplace.request(paths={"mvtec_wood": str(wood.folder)}, strict=True)

    with pytest.raises(
        AlmrrError,
        match=r"4 training, 2 normal and 3 defective .*"
        r"published are 247 training, 19 normal and 60 defective",
    ):
        wood.workplace.fetch("mvtec_wood", request)
    assert wood.workplace.leftovers() == []


def test_license_not_accepted(wood: Wood) -> None:
    with pytest.raises(
        AlmrrError, match=r"CC BY-NC-SA 4\.0.*add CC-BY-NC-SA-4\.0 to data\.accept_licenses"
    ):
        wood.workplace.fetch("mvtec_wood", wood.workplace.request(accept_licenses=[]))
    assert wood.workplace.leftovers() == []


def test_unknown_category(workplace: Any) -> None:
    with pytest.raises(AlmrrError, match=r"no 'mvtec_wod'\. Known are mvtec_wood,"):
        check_request(["mvtec_wod"], request=workplace.request())


def test_missing_mirror(workplace: Any, tmp_path: Path) -> None:
    with pytest.raises(
        AlmrrError, match=r"data\.mirror: there is no folder .*absent; correct the path"
    ):
        workplace.fetch("nanotwice", workplace.request(mirror=str(tmp_path / "absent")))
    assert workplace.leftovers() == []


def test_missing_archive_of_ones_own(workplace: Any, tmp_path: Path) -> None:
    own = {"nanotwice": str(tmp_path / "absent.zip")}

    with pytest.raises(
        AlmrrError, match=r"data\.paths\.nanotwice: there is nothing at .*absent\.zip"
    ):
        workplace.fetch("nanotwice", workplace.request(paths=own))
    assert workplace.leftovers() == []


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match=r"backbone\.weights: there is no file .*absent\.pth"):
        check_backbone(BackboneSettings(weights=str(tmp_path / "absent.pth")))
