"""Sizes of a new surface, from a budget and its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.own_data.budgets import read_budget, suit_input


def write(folder: Path, *sizes: tuple[int, int], orientation: int = 1) -> Path:
    """Good images of (columns, rows)."""
    (folder / "train/good").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"train/good/{number}.jpg", exif=exif)
    return folder


def suited(folder: Path) -> Any:
    sections: dict[str, Any] = {"data": {"image_size": [256, 256]}}
    suit_input(sections, folder)
    return sections["data"]["image_size"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((160, 160), [160, 160]),
        ((4000, 3000), [192, 256]),
        ((300, 1200), [256, 128]),  # no side below the least
        ((250, 100), [128, 256]),
    ],
)
def test_the_input_has_the_images_size_and_proportions(
    tmp_path: Path, size: tuple[int, int], expected: list[int]
) -> None:
    assert suited(write(tmp_path, size)) == expected


def test_one_odd_image_does_not_decide(tmp_path: Path) -> None:
    assert suited(write(tmp_path, (208, 160), (208, 160), (3000, 20))) == [160, 208]


def test_a_turned_photograph_is_measured_as_it_is_seen(tmp_path: Path) -> None:
    assert suited(write(tmp_path, (400, 300), orientation=6)) == [256, 192]


def test_without_images_or_a_size_nothing_is_chosen(tmp_path: Path) -> None:
    assert suited(tmp_path / "nowhere") == [256, 256]
    sections: dict[str, Any] = {}
    suit_input(sections, write(tmp_path, (160, 160)))
    assert sections == {}


def test_budgets_are_those_of_conf(project: Path) -> None:
    laptop = read_budget(project, "laptop")
    assert laptop["backbone"]["name"] == "tf_efficientnet_lite0"
    assert laptop["train"]["steps_per_image"] == 2.0
    assert read_budget(project, "as_suite") == {}
    with pytest.raises(AlmrrError, match="no budget phone; choose one of as_suite, laptop, paper"):
        read_budget(project, "phone")
