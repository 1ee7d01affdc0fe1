"""A user's own images, in MVTec AD's layout and in the flat one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from almrr_pipeline.common.errors import AlmrrError


@pytest.fixture
def flat(draw: Any, tmp_path: Path) -> Path:
    """normal, test/good, test/scratch and masks/scratch."""
    folder = tmp_path / "my tiles é"
    for number in range(3):
        draw.image(folder / "normal" / f"tile {number} é.jpg")
        draw.image(folder / "test" / "good" / f"{number}.BMP")
        draw.image(folder / "test" / "scratch" / f"{number}.tif")
        draw.mask(folder / "masks" / "scratch" / f"{number}.png")
    return folder


def fetch(workplace: Any, folder: Path) -> Any:
    return workplace.fetch("folder_tiles", workplace.request(paths={"folder_tiles": str(folder)}))


def kinds(manifest: Any) -> dict[tuple[str, str], int]:
    return manifest.groupby(["split", "defect_type"]).size().to_dict()


def test_the_flat_layout_with_masks(workplace: Any, flat: Path) -> None:
    manifest = fetch(workplace, flat)

    assert kinds(manifest) == {("test", "good"): 3, ("test", "scratch"): 3, ("train", "good"): 3}
    assert set(manifest["mask"]) - {""} == {
        f"01_raw/folder_tiles/masks/scratch/{number}.png" for number in range(3)
    }


def test_mvtecs_layout(workplace: Any, draw: Any, tmp_path: Path) -> None:
    manifest = fetch(workplace, draw.mvtec(tmp_path / "tiles"))

    assert kinds(manifest) == {
        ("test", "cut"): 2,
        ("test", "good"): 2,
        ("test", "hole"): 1,
        ("train", "good"): 4,
    }


def test_without_masks_no_image_has_one(workplace: Any, flat: Path) -> None:
    for path in (flat / "masks" / "scratch").iterdir():
        path.unlink()
    (flat / "masks" / "scratch").rmdir()
    (flat / "masks").rmdir()

    assert set(fetch(workplace, flat)["mask"]) == {""}


def test_with_some_masks_a_missing_one_is_missed(workplace: Any, flat: Path) -> None:
    (flat / "masks" / "scratch" / "1.png").unlink()

    with pytest.raises(AlmrrError, match=r"scratch/1\.tif is defective, but its mask"):
        fetch(workplace, flat)


def test_normal_images_alone_will_do(workplace: Any, draw: Any, tmp_path: Path) -> None:
    draw.image(tmp_path / "tiles" / "normal" / "0.png")

    assert kinds(fetch(workplace, tmp_path / "tiles")) == {("train", "good"): 1}


@pytest.mark.parametrize("inside", [".", "good"])
def test_validation_images_are_a_split_of_their_own(
    workplace: Any, flat: Path, draw: Any, inside: str
) -> None:
    draw.image(flat / "validation" / inside / "0.png")

    manifest = fetch(workplace, flat)

    assert kinds(manifest) == {
        ("test", "good"): 3,
        ("test", "scratch"): 3,
        ("train", "good"): 3,
        ("validation", "good"): 1,
    }
    assert set(manifest.loc[manifest["split"] == "validation", "label"]) == {"normal"}


def test_a_mask_may_have_any_of_the_two_names_and_any_format(
    workplace: Any, flat: Path, draw: Any
) -> None:
    (flat / "masks" / "scratch" / "1.png").unlink()
    draw.mask(flat / "masks" / "scratch" / "1_mask.bmp")

    assert fetch(workplace, flat)["mask"].str.endswith("1_mask.bmp").sum() == 1


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_serves_as_well(
    workplace: Any, flat: Path, tmp_path: Path, kind: str, pack: Callable[..., bytes]
) -> None:
    archive = tmp_path / f"tiles.{kind}"
    archive.write_bytes(pack(flat, kind, inside="some/folder"))

    assert len(fetch(workplace, archive)) == 9


def test_hidden_files_and_other_files_are_no_images(workplace: Any, flat: Path) -> None:
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (flat / "normal" / name).write_text("no image")

    assert len(fetch(workplace, flat)) == 9


def test_specimens_csv_names_the_images_of_the_same_specimen(workplace: Any, flat: Path) -> None:
    lines = [
        "image,specimen",
        "normal/tile 0 é.jpg,sheet 7",
        "normal\\tile 2 é.jpg,sheet 7",
        "test/good/0.BMP,sheet 9",
    ]
    (flat / "specimens.csv").write_text(
        "\n".join(lines), encoding="utf-8-sig"
    )  # as a spreadsheet saves it

    manifest = fetch(workplace, flat)

    named = manifest[manifest["specimen"] != ""].assign(
        name=manifest["image"].str.rpartition("/")[2]
    )
    assert named.groupby("specimen")["name"].apply(list).to_dict() == {
        "sheet 7": ["tile 0 é.jpg", "tile 2 é.jpg"],
        "sheet 9": ["0.BMP"],
    }
    assert len(manifest) - len(named) == 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "file,piece\nnormal/tile 0 é.jpg,7",
            "has the columns file, piece; it needs image and specimen",
        ),
        ("image,specimen\nnormal/absent.jpg,7", "line 2: there is no image normal/absent.jpg"),
        ("image,specimen\nnormal/tile 0 é.jpg,", "line 2: normal/tile 0 é.jpg has no specimen"),
        (
            "image,specimen\nnormal/tile 0 é.jpg,7\nnormal/tile 0 é.jpg,8",
            "line 3: .* has two specimens, 7 and 8",
        ),
        ("", "specimens.csv cannot be read"),
        (
            "image,specimen\nnormal/tile 0 é.jpg,7,8,9\na,b\n1,2,3,4,5,6",
            "specimens.csv cannot be read",
        ),
    ],
)
def test_an_unclear_specimens_csv_is_refused(
    workplace: Any, flat: Path, text: str, said: str
) -> None:
    (flat / "specimens.csv").write_text(text, encoding="utf-8")

    with pytest.raises(AlmrrError, match=said):
        fetch(workplace, flat)


def put_defect_into_training(draw: Any, folder: Path) -> None:
    draw.image(folder / "normal" / "scratch" / "0.png")


def put_image_beside_the_test_folders(draw: Any, folder: Path) -> None:
    draw.image(folder / "test" / "0.png")


def put_defect_into_validation(draw: Any, folder: Path) -> None:
    draw.image(folder / "validation" / "scratch" / "0.png")


def leave_validation_empty(draw: Any, folder: Path) -> None:
    (folder / "validation" / "good").mkdir(parents=True)
    (folder / "validation" / "good" / "notes.txt").write_text("no image")


def remove_training(draw: Any, folder: Path) -> None:
    (folder / "normal").rename(folder / "images")


def empty_training(draw: Any, folder: Path) -> None:
    for path in (folder / "normal").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (put_defect_into_training, "training and validation images are normal ones alone"),
        (
            put_defect_into_validation,
            r"validation/scratch/0\.png: training and validation images are normal ones alone",
        ),
        (leave_validation_empty, "validation: it holds no image"),
        (put_image_beside_the_test_folders, r"0\.png: next to the folders"),
        (
            remove_training,
            r"^data\.paths\.folder_tiles: .*: there is neither a folder train nor a folder normal",
        ),
        (empty_training, "no normal image to train on"),
    ],
)
def test_a_layout_that_says_not_what_is_normal_is_refused(
    workplace: Any, flat: Path, draw: Any, spoil: Callable[[Any, Path], None], said: str
) -> None:
    spoil(draw, flat)

    with pytest.raises(AlmrrError, match=said):
        fetch(workplace, flat)


def test_a_folder_that_is_not_there_is_named(workplace: Any, tmp_path: Path) -> None:
    with pytest.raises(
        AlmrrError, match=r"data\.paths\.folder_tiles: there is nothing at .*absent"
    ):
        fetch(workplace, tmp_path / "absent")


def test_normal_images_in_two_folders_are_refused(workplace: Any, draw: Any, flat: Path) -> None:
    (flat / "normal").rename(flat / "train")
    draw.image(flat / "train" / "good" / "1.png")
    draw.image(flat / "train" / "normal" / "2.png")
    with pytest.raises(AlmrrError, match="normal ones alone, in one folder"):
        fetch(workplace, flat)


def test_a_folder_without_images_does_not_matter(workplace: Any, flat: Path) -> None:
    """As network storage and image viewers leave."""
    (flat / "train").mkdir()
    (flat / "normal").rename(flat / "train" / "good")
    (flat / "train" / "@eaDir").mkdir()
    (flat / "train" / "@eaDir" / "index").touch()
    assert kinds(fetch(workplace, flat))["train", "good"] == 3
