"""Every dataset from every place: addresses, mirrors, archives and folders of the user's own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.datasets import registry
from almrr_pipeline.datasets.manifest import Counts, count_items
from almrr_pipeline.datasets.registry import dataset_for, fetch_textures, known_categories

MVTEC = [category for category in known_categories() if category.startswith("mvtec_")]
Pack = Callable[..., bytes]


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def counts_of(manifest: Any) -> Counts:
    kinds = manifest.groupby(["split", "label"]).size()
    keys = [("train", "normal"), ("test", "normal"), ("test", "defective")]
    return Counts(*(int(kinds.get(key, 0)) for key in keys))


def test_mvtec_ad_has_fifteen_categories_of_the_published_size() -> None:
    counts = [dataset_for(category).expected(category) for category in MVTEC]

    assert len(MVTEC) == 15
    assert (
        sum(each.train for each in counts if each) == 3629
    )  # totals of Bergmann et al. 2021, table 2
    assert sum(each.test_normal for each in counts if each) == 467
    assert sum(each.test_defective for each in counts if each) == 1258


@pytest.mark.parametrize("category", MVTEC)
def test_each_mvtec_category_comes_from_its_own_archive(
    category: str, server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    name = category.removeprefix("mvtec_")
    address = server.serve(
        f"{name}.tar.xz", pack(draw.mvtec(tmp_path / name), "tar.xz", inside=name)
    )

    manifest = workplace.fetch(category, workplace.request(addresses={category: [address]}))

    assert counts_of(manifest) == Counts(4, 2, 3)
    assert sorted(path.name for path in workplace.target(category).iterdir()) == [
        "ground_truth",
        "license.txt",
        "test",
        "train",
    ]
    assert not [name for name in workplace.leftovers() if name.startswith("scratch")]


def test_a_whole_category_passes_where_strict(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    folder = draw.mvtec(tmp_path / "carpet", train=280, good=28, defects={"cut": 17, "hole": 72})
    address = server.serve("carpet.tar.xz", pack(folder, "tar.xz", inside="carpet"))
    request = workplace.request(addresses={"mvtec_carpet": [address]}, strict=True)

    assert len(workplace.fetch("mvtec_carpet", request)) == 280 + 28 + 89


def bundle(draw: Any, pack: Pack, folder: Path) -> bytes:
    draw.mvtec(folder / "carpet", train=3)
    draw.mvtec(folder / "wood", train=5)
    return pack(folder, "tar.xz", inside="mvtec_anomaly_detection")


def test_the_bundle_is_the_fallback_and_is_fetched_once(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    content = bundle(draw, pack, tmp_path / "bundle")
    addresses = {
        "mvtec_carpet": [f"{server.base}/gone/carpet.tar.xz"],
        "mvtec_wood": [f"{server.base}/gone/wood.tar.xz"],
        "mvtec_ad": [server.serve("mvtec_anomaly_detection.tar.xz", content)],
    }
    request = workplace.request(addresses=addresses, sha256={"mvtec_ad": sha256_of(content)})

    assert counts_of(workplace.fetch("mvtec_carpet", request)).train == 3
    assert counts_of(workplace.fetch("mvtec_wood", request)).train == 5
    assert [path for path, _ in server.requests] == [
        "/gone/carpet.tar.xz",
        "/mvtec_anomaly_detection.tar.xz",
        "/gone/wood.tar.xz",
    ]


def test_mt_defect_is_split_by_the_hash_of_the_name(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    defects = {"Blowhole": 115, "Break": 85, "Crack": 57, "Fray": 32, "Uneven": 103}
    folder = draw.mt_defect(tmp_path / "mt", free=952, defects=defects)
    address = server.serve(
        "master", pack(folder, "zip", inside="Magnetic-tile-defect-datasets.-master")
    )
    request = workplace.request(addresses={"mt_defect": [address]}, strict=True)

    manifest = workplace.fetch("mt_defect", request)

    names = manifest[manifest["defect_type"] == "good"]["image"].str.rpartition("/")[2]
    trained = manifest[manifest["split"] == "train"]["image"].str.rpartition("/")[2]
    ranked = sorted(names, key=lambda name: sha256_of(name.encode()))
    assert set(trained) == set(ranked[:761])
    assert manifest[manifest["split"] == "test"].groupby("defect_type").size().to_dict() == {
        "good": 191,
        **{name.lower(): count for name, count in defects.items()},
    }


def test_no_tile_of_mt_defect_tiles_is_trained_on_and_tested(
    draw: Any, workplace: Any, tmp_path: Path
) -> None:
    folder = draw.mt_defect(tmp_path / "mirror" / "mt_defect", free=0, defects={"Blowhole": 1})
    generator = np.random.default_rng(1)
    tiles = [gaussian_filter(generator.normal(0, 60, (120, 100)), 1) + 110 for _ in range(5)]
    for number, tile in enumerate(tiles):
        for exposure, gain in enumerate((0.6, 1.0, 1.3)):
            light = np.linspace(gain, 1.0, 100)
            # The last tile's last image shows its defect.
            kind = "Crack" if (number, exposure) == (4, 2) else "Free"
            path = folder / f"MT_{kind}" / "Imgs" / f"exp{exposure}_num_{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(tile * light, 0, 255).astype(np.uint8)).save(path)
            Image.fromarray(np.full((120, 100), 255 * (kind == "Crack"), np.uint8)).save(
                path.with_suffix(".png")
            )

    manifest = workplace.fetch(
        "mt_defect_tiles", workplace.request(mirror=str(tmp_path / "mirror"))
    )

    tile = (
        manifest["image"]
        .str.extract(r"num_(\d)\.", expand=False)
        .where(manifest["defect_type"] != "blowhole", "other")
    )
    assert manifest.groupby("specimen")["image"].count().sort_values().tolist() == [
        1,
        3,
        3,
        3,
        3,
        3,
    ]
    assert (manifest.groupby(tile)["specimen"].nunique() == 1).all()
    assert (manifest.groupby("specimen")["split"].nunique() == 1).all()
    assert set(manifest.loc[tile == "4", "split"]) == {"test"}
    assert (manifest["split"] == "train").sum() == 12


def test_mt_defect_tiles_misses_its_list_of_tiles(draw: Any, tmp_path: Path) -> None:
    folder = draw.mt_defect(tmp_path / "mt_defect_tiles")

    with pytest.raises(
        AlmrrError, match=r"mt_defect_tiles holds no specimens\.csv.*fetch mt_defect_tiles again"
    ):
        dataset_for("mt_defect_tiles").items("mt_defect_tiles", folder)


def test_nanotwice_has_no_normal_test_image(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    address = server.serve(
        "dfg05er_Data.zip", pack(draw.nanotwice(tmp_path / "nano"), "zip", inside="Data")
    )

    manifest = workplace.fetch(
        "nanotwice", workplace.request(addresses={"nanotwice": [address]}, strict=True)
    )

    assert counts_of(manifest) == Counts(5, 0, 40)


def test_dtd_becomes_folders_of_images(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    content = pack(draw.dtd(tmp_path / "dtd"), "tar.gz", inside="dtd")
    address = server.serve("dtd-r1.0.1.tar.gz", content)
    target = workplace.target("textures")
    target.mkdir(parents=True)

    request = workplace.request(addresses={"dtd": [address]}, sha256={"dtd": sha256_of(content)})
    fetch_textures("dtd", target=target, request=request)

    assert sorted(path.relative_to(target).as_posix() for path in target.rglob("*.jpg")) == [
        "banded/banded_0000.jpg",
        "banded/banded_0001.jpg",
        "dotted/dotted_0000.jpg",
        "dotted/dotted_0001.jpg",
    ]


@pytest.mark.parametrize("fault", ["too few and strict", "broken image"])
def test_dtd_is_checked_too(draw: Any, workplace: Any, tmp_path: Path, fault: str) -> None:
    folder = draw.dtd(tmp_path / "dtd")
    if fault == "broken image":
        (folder / "images" / "banded" / "banded_0000.jpg").write_bytes(b"")
    target = workplace.target("textures")
    target.mkdir(parents=True)
    request = workplace.request(
        mirror=str(tmp_path), addresses={"dtd": []}, strict=fault == "too few and strict"
    )

    said = (
        "4 images, published are 5640"
        if request.settings.strict
        else r"banded_0000\.jpg is an empty file"
    )
    with pytest.raises(AlmrrError, match=said):
        fetch_textures("dtd", target=target, request=request)
    assert list(target.iterdir()) == []


def mirror_folder(draw: Any, folder: Path) -> Path:
    draw.mvtec(folder / "mvtec_ad" / "wood")
    draw.mt_defect(folder / "mt_defect")
    draw.nanotwice(folder / "nanotwice")
    return folder


@pytest.mark.parametrize("category", ["mvtec_wood", "mt_defect", "nanotwice"])
@pytest.mark.parametrize("as_address", [False, True], ids=["path", "file://"])
def test_a_mirror_folder_is_copied_from(
    category: str, as_address: bool, draw: Any, workplace: Any, tmp_path: Path
) -> None:
    mirror = mirror_folder(draw, tmp_path / "a mirror é")
    before = sorted(path for path in mirror.rglob("*"))

    manifest = workplace.fetch(
        category, workplace.request(mirror=mirror.as_uri() if as_address else str(mirror))
    )

    assert len(manifest) > 0
    assert sorted(path for path in mirror.rglob("*")) == before
    copies = [path for path in workplace.target(category).rglob("*") if path.is_file()]
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in copies)


def test_a_read_only_mirror_does_not_make_a_read_only_copy(
    draw: Any, workplace: Any, tmp_path: Path
) -> None:
    mirror = mirror_folder(draw, tmp_path / "mirror")
    for path in (mirror / "nanotwice").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)

    workplace.fetch("nanotwice", workplace.request(mirror=str(mirror)))

    assert all(path.stat().st_mode & 0o200 for path in workplace.target("nanotwice").rglob("*"))
    for path in (mirror / "nanotwice").rglob("*"):
        path.chmod(0o755)


@pytest.mark.parametrize(
    "where", ["wood.tar.xz", "mvtec_ad/wood.tar.xz", "mvtec_anomaly_detection.tar.xz"]
)
def test_a_mirror_folder_may_hold_archives(
    where: str, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    archive = tmp_path / "mirror" / where
    archive.parent.mkdir(parents=True)
    archive.write_bytes(pack(draw.mvtec(tmp_path / "drawn" / "wood").parent, "tar.xz"))
    request = workplace.request(
        mirror=str(tmp_path / "mirror"), sha256={"mvtec_ad": sha256_of(archive.read_bytes())}
    )

    assert counts_of(workplace.fetch("mvtec_wood", request)) == Counts(4, 2, 3)


def test_a_mirror_behind_http_is_asked_before_the_addresses(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    server.serve("base/dfg05er_Data.zip", pack(draw.nanotwice(tmp_path / "nano"), "zip"))
    request = workplace.request(
        mirror=f"{server.base}/base/",
        addresses={"nanotwice": [f"{server.base}/public/dfg05er_Data.zip"]},
    )

    workplace.fetch("nanotwice", request)

    assert [path for path, _ in server.requests] == ["/base/dfg05er_Data.zip"]


def test_what_a_mirror_lacks_comes_from_the_addresses(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    address = server.serve("nano.zip", pack(draw.nanotwice(tmp_path / "nano"), "zip"))
    (tmp_path / "mirror").mkdir()
    request = workplace.request(mirror=str(tmp_path / "mirror"), addresses={"nanotwice": [address]})

    assert len(workplace.fetch("nanotwice", request)) == 45


def test_a_dead_address_is_followed_by_the_next(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    good = pack(draw.nanotwice(tmp_path / "nano"), "zip")
    addresses = [
        f"{server.base}/dead.zip",
        server.serve("page.zip", b"<html>Please log in</html>"),
        server.serve("other.zip", pack(draw.mvtec(tmp_path / "other"), "zip")),
        server.serve("good.zip", good),
    ]

    assert (
        len(workplace.fetch("nanotwice", workplace.request(addresses={"nanotwice": addresses})))
        == 45
    )


@pytest.mark.parametrize("key", ["mvtec_wood", "mvtec_ad"])
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_an_own_archive_or_folder_serves_instead_and_needs_no_license(
    key: str, kind: str, server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    own = draw.mvtec(tmp_path / "own" / "wood").parent
    if kind == "archive":
        own = tmp_path / "downloaded by hand.tar"
        own.write_bytes(pack(tmp_path / "own", "tar"))
    request = workplace.request(paths={key: str(own)}, accept_licenses=[], mirror=server.base)

    assert counts_of(workplace.fetch("mvtec_wood", request)) == Counts(4, 2, 3)
    assert server.requests == []


def test_a_changed_bundle_of_ones_own_is_unpacked_again(
    draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    own = tmp_path / "bundle.tar"
    request = workplace.request(paths={"mvtec_ad": str(own)})
    own.write_bytes(pack(draw.mvtec(tmp_path / "one" / "wood").parent, "tar"))
    workplace.fetch("mvtec_wood", request)
    own.write_bytes(pack(draw.mvtec(tmp_path / "two" / "carpet", train=7).parent, "tar"))

    assert counts_of(workplace.fetch("mvtec_carpet", request)).train == 7


def test_the_license_is_named_before_anything_is_asked_for(
    workplace: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for category, said in (
        ("mvtec_wood", "CC BY-NC-SA 4.0"),
        ("mt_defect", "Huang"),
        ("nanotwice", "Carrera"),
    ):
        caplog.clear()
        key = "mvtec_ad" if category == "mvtec_wood" else category
        addresses = {category: ["http://127.0.0.1:9/a.zip"], key: ["http://127.0.0.1:9/a.zip"]}
        with pytest.raises(AlmrrError):
            workplace.fetch(category, workplace.request(addresses=addresses))
        messages = [record.getMessage() for record in caplog.records]
        assert said in messages[0]
        assert any("looking at" in message for message in messages[1:])


def test_the_terms_of_mvtec_ad_have_to_be_accepted(server: Any, workplace: Any) -> None:
    request = workplace.request(accept_licenses=[], mirror=server.base)

    with pytest.raises(
        AlmrrError, match=r"non-commercial use.*add CC-BY-NC-SA-4\.0 to data\.accept_licenses"
    ):
        workplace.fetch("mvtec_wood", request)
    assert server.requests == []


def test_an_interrupted_fetch_goes_on_where_it_stopped(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    content = pack(draw.nanotwice(tmp_path / "nano"), "zip")
    address = server.serve("nano.zip", content, always_drops=1000, ranges=False)
    request = workplace.request(addresses={"nanotwice": [address]})
    with pytest.raises(AlmrrError, match="broke off"):
        workplace.fetch("nanotwice", request)
    server.serve("nano.zip", content)
    server.requests.clear()

    assert len(workplace.fetch("nanotwice", request)) == 45
    assert server.requests == [("/nano.zip", "bytes=1000-")]
    assert not [name for name in workplace.leftovers() if name.startswith("scratch")]


def test_fetch_counts_what_it_brought_before_it_calls_it_done(
    draw: Any, workplace: Any, tmp_path: Path
) -> None:
    mirror = mirror_folder(draw, tmp_path / "mirror")
    request = workplace.request(mirror=str(mirror), addresses={"mt_defect": []}, strict=True)

    with pytest.raises(
        AlmrrError,
        match=r"5 training, 0 normal and 3 defective .*"
        r"published are 761 training, 191 normal and 392 defective",
    ):
        workplace.fetch("mt_defect", request)
    assert workplace.leftovers() == []


def test_messages_hide_passwords_and_queries_but_not_paths(
    server: Any, workplace: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    host = server.base.removeprefix("http://")
    addresses = [f"http://me:secret@{host}/a.zip?token=secret", str(tmp_path / "absent.zip")]

    with pytest.raises(AlmrrError) as caught:
        workplace.fetch("nanotwice", workplace.request(addresses={"nanotwice": addresses}))
    assert f"http://{host}/a.zip?... (the server answers 404" in str(caught.value)
    assert f"{tmp_path / 'absent.zip'} (there is no such file)" in str(caught.value)
    assert "secret" not in str(caught.value) + caplog.text


def test_items_are_listed_without_opening_them(draw: Any, tmp_path: Path) -> None:
    folder = draw.mvtec(tmp_path / "wood")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")

    assert count_items(dataset_for("mvtec_wood").items("mvtec_wood", folder)) == Counts(4, 2, 3)


def test_textures_of_packages_need_no_address(
    workplace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(registry, "write_package_textures", asked.append)

    fetch_textures(
        "package", target=workplace.root, request=workplace.request(addresses={"dtd": []})
    )

    assert asked == [workplace.root]


def test_what_a_killed_run_has_left_is_no_part_of_the_next(
    server: Any, draw: Any, pack: Pack, workplace: Any, tmp_path: Path
) -> None:
    draw.nanotwice(workplace.scratch / "unpacked-nanotwice", normal=9)
    address = server.serve("nano.zip", pack(draw.nanotwice(tmp_path / "nano"), "zip"))

    manifest = workplace.fetch("nanotwice", workplace.request(addresses={"nanotwice": [address]}))

    assert counts_of(manifest) == Counts(5, 0, 40)
    assert not [name for name in workplace.leftovers() if name.startswith("scratch")]
