"""Regional features against resizing to the image's size and pooling, written out in loops."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.kernels.composed import apply_separably, bilinear_matrix
from almrr_pipeline.model.regional_features import RegionalFeatures, regional_features

Map = npt.NDArray[np.float64]


def resize(x: Map, rows: int, columns: int) -> Map:
    """Bilinear, align_corners=True: the first and last positions of input and output coincide."""
    out = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            y, z = i * (x.shape[0] - 1) / (rows - 1), j * (x.shape[1] - 1) / (columns - 1)
            top, left = min(int(y), x.shape[0] - 2), min(int(z), x.shape[1] - 2)
            fy, fz = y - top, z - left
            out[i, j] = (1 - fy) * ((1 - fz) * x[top, left] + fz * x[top, left + 1]) + fy * (
                (1 - fz) * x[top + 1, left] + fz * x[top + 1, left + 1]
            )
    return out


def pool(x: Map) -> Map:
    """Mean over 4x4 with stride 4."""
    out = np.zeros((x.shape[0] // 4, x.shape[1] // 4))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = sum(x[4 * i + a, 4 * j + b] for a in range(4) for b in range(4)) / 16
    return out


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_equal_to_resizing_and_pooling_in_loops(stage: int) -> None:
    size, stride = (128, 144), (4, 8, 16)[stage]
    x = torch.rand(1, 1, size[0] // stride, size[1] // stride)
    expected = pool(resize(x[0, 0].double().numpy(), *size))
    given = RegionalFeatures(size).transform(stage, x)[0, 0]
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_equal_to_torchs_resizing_and_pooling_at_the_papers_size(channels_last: bool) -> None:
    maps = [torch.rand(2, c, n, n) for c, n in ((3, 64), (5, 32), (7, 16))]
    if channels_last:
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    resized = [F.interpolate(x, size=(256, 256), mode="bilinear", align_corners=True) for x in maps]
    expected = torch.cat([F.avg_pool2d(x, 4) for x in resized], dim=1)
    torch.testing.assert_close(regional_features(maps, (256, 256)), expected, rtol=0, atol=0)
    given = RegionalFeatures((256, 256))(maps)
    assert given.shape == (2, 15, 64, 64)
    torch.testing.assert_close(given, expected, rtol=0, atol=2e-6)
    assert given.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_a_constant_map_stays_constant() -> None:
    given = RegionalFeatures((144, 256))(
        [torch.full((1, 1, 144 // s, 256 // s), 3.0) for s in (4, 8, 16)]
    )
    torch.testing.assert_close(given, torch.full((1, 3, 36, 64), 3.0))


def test_the_matrices_are_no_weights() -> None:
    assert RegionalFeatures((128, 128)).state_dict() == {}


def test_bilinear_matrix_by_hand() -> None:
    expected = torch.tensor(
        [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]], dtype=torch.float64
    )
    torch.testing.assert_close(bilinear_matrix(3, 5), expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_apply_separably_is_two_matrix_products_a_channel(channels_last: bool) -> None:
    x, rows, columns = torch.rand(2, 3, 4, 5), torch.rand(6, 4), torch.rand(7, 5)
    given = apply_separably(
        x.contiguous(memory_format=torch.channels_last) if channels_last else x, rows, columns
    )
    for b in range(2):
        for c in range(3):
            torch.testing.assert_close(given[b, c], rows @ x[b, c] @ columns.T)
