"""The list of images, and what it refuses to list."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.datasets.manifest import (
    COLUMNS,
    Counts,
    Item,
    build_manifest,
    split_validation,
    training_split,
)
from almrr_pipeline.datasets.registry import dataset_for


@pytest.fixture
def items(draw: Any, tmp_path: Path) -> list[Item]:
    """A drawn category with 4 training, 2 normal and 3 defective test images."""
    folder = draw.mvtec(tmp_path / "01_raw" / "mvtec_wood")
    return dataset_for("mvtec_wood").items("mvtec_wood", folder)


def build(items: list[Item], root: Path, **changes: Any) -> pd.DataFrame:
    return build_manifest(items, root=root, **{"expected": None, "strict": False, **changes})


def test_a_row_says_what_is_in_the_file(items: list[Item], tmp_path: Path) -> None:
    manifest = build(items, tmp_path)
    row = manifest.set_index("image").loc["01_raw/mvtec_wood/test/hole/000.png"]

    content = (tmp_path / "01_raw/mvtec_wood/test/hole/000.png").read_bytes()
    assert tuple(manifest.columns) == COLUMNS
    assert row.to_dict() == {
        "mask": "01_raw/mvtec_wood/ground_truth/hole/000_mask.png",
        "split": "test",
        "label": "defective",
        "defect_type": "hole",
        "specimen": "",
        "width": 20,
        "height": 16,
        "sha256": hashlib.sha256(content).hexdigest(),
        "mode": "L",
        "dtype": "uint8",
        "low": 0.0,
        "high": 255.0,
        "white": "",
    }


def test_rows_are_sorted_and_do_not_depend_on_the_order_of_the_disk(
    items: list[Item], tmp_path: Path
) -> None:
    manifest = build(items, tmp_path)

    assert list(zip(manifest["split"], manifest["image"], strict=True)) == sorted(
        zip(manifest["split"], manifest["image"], strict=True)
    )
    pd.testing.assert_frame_equal(build(items[::-1], tmp_path), manifest)


def test_normal_images_have_no_mask(items: list[Item], tmp_path: Path) -> None:
    manifest = build(items, tmp_path)

    assert set(manifest.loc[manifest["label"] == "normal", "mask"]) == {""}
    assert set(manifest.loc[manifest["label"] == "normal", "defect_type"]) == {"good"}


def test_equal_counts_pass_where_strict(items: list[Item], tmp_path: Path) -> None:
    assert len(build(items, tmp_path, expected=Counts(4, 2, 3), strict=True)) == 9


def test_other_counts_are_logged_or_refused(
    items: list[Item], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(items, tmp_path, expected=Counts(247, 19, 60))

    said = (
        "4 training, 2 normal and 3 defective test images; "
        "published are 247 training, 19 normal and 60 defective"
    )
    assert said in caplog.text
    with pytest.raises(AlmrrError, match=said):
        build(items, tmp_path, expected=Counts(247, 19, 60), strict=True)


def test_nothing_to_train_on_is_refused(items: list[Item], tmp_path: Path) -> None:
    with pytest.raises(AlmrrError, match="no normal image to train on"):
        build([item for item in items if item.split == "test"], tmp_path)
    with pytest.raises(AlmrrError, match="no normal image to train on"):
        build([], tmp_path)


def test_all_broken_images_are_named_at_once(items: list[Item], tmp_path: Path) -> None:
    broken = [item.image for item in items[:7]]
    for path in broken:
        path.write_bytes(b"")

    with pytest.raises(AlmrrError, match="And 2 more of this kind") as caught:
        build(items, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() in str(caught.value) for path in broken] == [
        True
    ] * 5 + [False] * 2


@pytest.mark.parametrize("again", ["copied", "saved in another format"])
def test_the_same_image_in_train_and_test_is_refused(
    items: list[Item], tmp_path: Path, again: str
) -> None:
    train, test = items[0].image, items[-1].image.with_suffix(".bmp")
    if again == "copied":
        shutil.copy(train, test)
    else:
        Image.open(train).convert("RGB").save(test)
    leaky = [*items, Item(test, None, "test", "normal", "good")]

    with pytest.raises(
        AlmrrError, match=r"in train and in test: .*train/good/000\.png and .*\.bmp"
    ):
        build(leaky, tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_validation_image_is_in_no_other_split(
    items: list[Item], tmp_path: Path, split: str
) -> None:
    other = next(item.image for item in items if item.split == split)
    copy = other.with_name("copy.png")
    shutil.copy(other, copy)

    said = "in train and in validation" if split == "train" else "in validation and in test"
    with pytest.raises(AlmrrError, match=said):
        build([*items, Item(copy, None, "validation", "normal", "good")], tmp_path)


def test_the_same_image_twice_in_train_is_allowed(items: list[Item], tmp_path: Path) -> None:
    copy = items[0].image.with_name("copy.png")
    shutil.copy(items[0].image, copy)

    assert len(build([*items, Item(copy, None, "train", "normal", "good")], tmp_path)) == 10


def test_a_defective_image_with_an_empty_mask_is_kept(
    items: list[Item], tmp_path: Path, draw: Any
) -> None:
    defective = next(item for item in items if item.mask)
    draw.mask(defective.mask, empty=True)

    manifest = build(items, tmp_path)

    assert (manifest["label"] == "defective").sum() == 3


def test_width_and_height_are_those_of_the_upright_image(tmp_path: Path, draw: Any) -> None:
    path = draw.image(tmp_path / "lying.png", (16, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)

    manifest = build([Item(path, None, "train", "normal", "good")], tmp_path)

    assert (manifest["width"][0], manifest["height"][0]) == (16, 20)


@pytest.mark.skipif(
    os.name == "nt" or sys.platform == "darwin", reason="these systems allow no such names"
)
def test_a_name_that_is_not_utf8_is_named(items: list[Item], tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(items[0].image.parent) + b"/gr\xfcn.png"))
    items[0].image.rename(odd)

    with pytest.raises(AlmrrError, match="not UTF-8 text"):
        build([Item(odd, None, "train", "normal", "good"), *items[1:]], tmp_path)


NAMES = st.lists(st.text(max_size=8), unique=True, max_size=60)
FRACTIONS = st.floats(0.0, 0.5)


@given(NAMES, FRACTIONS)
def test_every_name_is_for_training_or_for_validation(names: list[str], fraction: float) -> None:
    training, validation = split_validation(names, fraction)

    assert sorted(training + validation) == sorted(names)
    assert training or not names


@given(NAMES, FRACTIONS, st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order(
    names: list[str], fraction: float, random: Any
) -> None:
    shuffled = list(names)
    random.shuffle(shuffled)

    assert set(split_validation(shuffled, fraction)[1]) == set(split_validation(names, fraction)[1])


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(10, 0.0, 0), (1, 0.5, 0), (2, 0.1, 1), (5, 0.1, 1), (100, 0.1, 10), (3, 0.5, 2)],
)
def test_the_fraction_is_rounded_and_at_least_one(
    count: int, fraction: float, expected: int
) -> None:
    assert len(split_validation([str(number) for number in range(count)], fraction)[1]) == expected


def test_the_validation_names_are_those_of_the_lowest_hash() -> None:
    names = [f"{number:03}.png" for number in range(20)]
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())

    assert set(split_validation(names, 0.25)[1]) == set(ranked[:5])


def test_validation_takes_normal_training_images_alone(items: list[Item], tmp_path: Path) -> None:
    manifest = build(items, tmp_path)

    training, validation = training_split(manifest, fraction=0.5)

    assert len(validation) == 2
    assert (
        sorted(training + validation)
        == manifest.loc[manifest["split"] == "train", "image"].tolist()
    )


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_validation_images_of_the_dataset_are_used_and_no_others(
    items: list[Item], tmp_path: Path, draw: Any, fraction: float
) -> None:
    extra = tmp_path / "01_raw" / "mvtec_wood" / "validation" / "good" / "0.png"
    draw.image(extra, (16, 20))
    manifest = build([*items, Item(extra, None, "validation", "normal", "good")], tmp_path)

    training, validation = training_split(manifest, fraction=fraction)

    assert validation == ["01_raw/mvtec_wood/validation/good/0.png"]
    assert training == manifest.loc[manifest["split"] == "train", "image"].tolist()


def test_validation_does_not_depend_on_where_the_images_lie(
    items: list[Item], tmp_path: Path
) -> None:
    manifest = build(items, tmp_path)
    elsewhere = manifest.assign(image="other/" + manifest["image"])

    _, validation = training_split(manifest, fraction=0.5)

    assert training_split(elsewhere, fraction=0.5)[1] == ["other/" + name for name in validation]


def test_two_copies_of_an_image_stay_on_the_same_side(items: list[Item], tmp_path: Path) -> None:
    manifest = build(items, tmp_path)
    twice = pd.concat(
        [manifest, manifest.assign(image="copy/" + manifest["image"])], ignore_index=True
    )

    for side in training_split(twice, fraction=0.5):
        assert {name for name in side if not name.startswith("copy/")} == {
            name.removeprefix("copy/") for name in side if name.startswith("copy/")
        }


def test_images_of_one_specimen_stay_on_the_same_side(items: list[Item], tmp_path: Path) -> None:
    manifest = build(items, tmp_path)
    trained = manifest["split"] == "train"
    manifest.loc[trained, "specimen"] = ["left", "right", "left", "right"]

    for fraction in (0.1, 0.5):
        training, validation = (
            set(manifest.set_index("image").loc[side, "specimen"])
            for side in training_split(manifest, fraction=fraction)
        )
        assert len(training) == len(validation) == 1
        assert training != validation


@pytest.mark.parametrize(
    ("category", "counts"),
    [
        ("mt_defect", (761, 191, 392)),
        ("mt_defect_tiles", (761, 191, 392)),
        ("mt_defect_differnet", (761, 191, 392)),
        ("nanotwice", (5, 0, 40)),
    ],
)
def test_the_real_sets_have_their_published_counts(
    shared: Path,
    workplace: Any,
    caplog: pytest.LogCaptureFixture,
    category: str,
    counts: tuple[int, int, int],
) -> None:
    caplog.set_level(logging.WARNING)
    manifest = workplace.fetch(
        category, workplace.request(mirror=str(shared / "data"), strict=True)
    )

    kinds = manifest.groupby(["split", "label"]).size()
    assert (
        tuple(
            kinds.get(key, 0)
            for key in [("train", "normal"), ("test", "normal"), ("test", "defective")]
        )
        == counts
    )
    assert (manifest["mask"] != "").sum() == counts[2]
    assert ("and 1 more: the mask shows no defect" in caplog.text) == category.startswith("mt_")
    alike = r"(\d+) pairs of images in different splits look like the same specimen"
    pairs = sum(map(int, re.findall(alike, caplog.text)))  # named even where strict: as published
    assert pairs < 20 if category in {"nanotwice", "mt_defect_tiles"} else pairs > 500


def test_one_changed_file_changes_the_list(shared: Path, workplace: Any, draw: Any) -> None:
    before = workplace.fetch("nanotwice", workplace.request(mirror=str(shared / "data")))
    dataset, target = dataset_for("nanotwice"), workplace.target("nanotwice")
    draw.image(next((target / "Normal").iterdir()), (700, 1024))

    after = build(dataset.items("nanotwice", target), workplace.root / "data")

    assert (before["sha256"] != after["sha256"]).sum() == 1
