from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import read_image
from almrr_pipeline.datasets import textures
from almrr_pipeline.datasets.sample import TEXTURES
from almrr_pipeline.datasets.textures import (
    IMAGES,
    LARGEST,
    LEAST_STD,
    cut_squares,
    read_package_image,
    write_package_textures,
)

pytestmark = pytest.mark.xdist_group("textures")  # cut once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("textures")
    write_package_textures(target)
    return target


def test_every_image_gives_at_least_one_square_texture(folder: Path) -> None:
    written = sorted(folder.iterdir())
    assert {path.stem.rsplit("_", 1)[0] for path in written} == {Path(name).stem for name in IMAGES}
    assert 80 < len(written) < 200
    for path in written:
        image = read_image(path)
        assert 64 <= image.shape[0] == image.shape[1] <= LARGEST
        assert image.mean(axis=2).std() >= 0.9 * LEAST_STD  # scaling down smooths a little


def test_the_sample_suites_own_textures_are_not_among_them() -> None:
    assert not {f"{texture}.png" for texture in TEXTURES} & set(IMAGES)


def test_they_are_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    write_package_textures(tmp_path)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_squares_cover_an_image_at_two_scales() -> None:
    rows, columns = np.indices((20, 50))
    image = np.stack([5 * columns, 5 * rows, 200 * ((rows + columns) % 2)], axis=-1).astype(
        np.uint8
    )
    squares = list(cut_squares(image))
    assert [square.shape[0] for square in squares] == [20] * 3 + [11] * 10
    for side in (20, 11):
        seen = {
            tuple(pixel[:2])
            for square in squares
            if len(square) == side
            for pixel in square.reshape(-1, 3)
        }
        assert len(seen) == 20 * 50


def test_uniform_squares_are_left_out() -> None:
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    image[::2, 20:] = 255
    assert all(square.std() > 0 for square in cut_squares(image))
    assert not list(cut_squares(np.full((20, 20, 3), 90, dtype=np.uint8)))


def test_image_that_the_installed_scikit_image_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AlmrrError, match=r"does not carry unheard_of\.png"):
        read_package_image("unheard_of.png")
    monkeypatch.setattr(textures, "IMAGES", ("unheard_of.png",))
    with pytest.raises(AlmrrError, match=r"data\.textures"):
        write_package_textures(tmp_path)
