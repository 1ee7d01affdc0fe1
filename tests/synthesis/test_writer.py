from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.format import open_memmap

from almrr_pipeline.common.images import read_image, resize_image
from almrr_pipeline.config import SynthesisSettings
from almrr_pipeline.synthesis.writer import SetWriter, scale_image

SIZE = (32, 16)


@pytest.fixture
def writer(tmp_path: Path) -> SetWriter:
    """A writer of a folder with an empty array of nine normal images."""
    open_memmap(tmp_path / "normals.npy", mode="w+", dtype=np.uint8, shape=(9, *SIZE, 3))
    return SetWriter(tmp_path, SynthesisSettings(), seed=7, crop_scale=1.5)


def test_resized_images_are_those_of_the_one_resize_function(
    writer: SetWriter, images: SimpleNamespace
) -> None:
    assert writer.write_resized("normals", images.training, range(1, 5)) == 4
    written = writer.open("normals")
    assert not written[[0, 5, 6, 7, 8]].any()
    for row, path in enumerate(images.training, start=1):
        np.testing.assert_array_equal(written[row], resize_image(read_image(path), SIZE))


def test_crops_are_cut_out_of_the_scaled_image_and_differ(
    writer: SetWriter, images: SimpleNamespace
) -> None:
    path = images.training[0]
    assert writer.write_crops("", path, range(0, 9, 3)) == 3
    written = writer.open("normals")
    scaled = scale_image(read_image(path), 1.5, at_least=SIZE)
    assert scaled.shape == (90, 135, 3)
    windows = np.lib.stride_tricks.sliding_window_view(scaled[..., 0], SIZE)
    places = [np.argwhere((windows == written[row, ..., 0]).all(axis=(2, 3))) for row in (0, 3, 6)]
    assert [len(found) for found in places] == [1, 1, 1]
    assert len({tuple(found[0]) for found in places}) == 3
    assert not written[[1, 2, 4, 5, 7, 8]].any()


def test_image_smaller_than_a_crop_is_reflected_around() -> None:
    image = np.arange(4, dtype=np.uint8)[None, :, None].repeat(6, 0).repeat(3, 2)
    padded = scale_image(image, 1.0, at_least=(6, 7))
    assert padded[0, :, 0].tolist() == [1, 0, 1, 2, 3, 2, 1]
    np.testing.assert_array_equal(padded, padded[:1].repeat(6, 0))
