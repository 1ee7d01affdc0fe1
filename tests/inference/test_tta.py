from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.inference.tta import FlipAveraged, average_flips


class Slanted(nn.Module):
    """Brightness times weights that differ by pixel, so that every flip changes the map."""

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = images.shape[2:]
        weights = torch.arange(float(rows * columns)).view(rows, columns) / (rows * columns)
        return images.mean(1) * weights


def test_the_mean_is_taken_over_the_four_mirror_images() -> None:
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    model = Slanted().eval()
    expected = np.mean(
        [
            model(images).numpy(),
            model(images.flip(3)).numpy()[:, :, ::-1],
            model(images.flip(2)).numpy()[:, ::-1],
            model(images.flip(2, 3)).numpy()[:, ::-1, ::-1],
        ],
        axis=0,
    )

    given = FlipAveraged(model)(images)

    torch.testing.assert_close(given, torch.from_numpy(expected))
    assert (given - model(images)).abs().max() > 0.1


@pytest.mark.parametrize("dimension", [1, 2])
def test_maps_turn_with_the_image(dimension: int) -> None:
    images = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    flips = FlipAveraged(Slanted().eval())

    torch.testing.assert_close(flips(images.flip(dimension + 1)), flips(images).flip(dimension))


def test_whether_it_trains_is_whether_the_model_does() -> None:
    model = Slanted()
    assert average_flips(model, False) is model
    assert average_flips(model.train(), True).training
    assert not average_flips(model.eval(), True).training


def test_a_predictor_follows_the_models_settings(
    model_folder: Path, flips_model_folder: Path, noise: list[ImageArray]
) -> None:
    square = [np.ascontiguousarray(np.resize(image, (128, 128, 3))) for image in noise]
    plain, flips = Predictor(model_folder), Predictor(flips_model_folder)  # of equal weights
    mirrors = [[image, image[:, ::-1], image[::-1], image[::-1, ::-1]] for image in square]

    for given, four in zip(flips(square), mirrors, strict=True):
        one, right, down, both = (
            p.anomaly_map for p in plain(np.ascontiguousarray(each) for each in four)
        )
        expected = np.mean([one, right[:, ::-1], down[::-1], both[::-1, ::-1]], axis=0)
        np.testing.assert_allclose(given.anomaly_map, expected, rtol=0, atol=1e-5)


def test_the_network_runs_once_for_all_flips() -> None:
    model = Slanted().eval()
    batches: list[int] = []
    model.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))

    average_flips(model, True)(torch.rand(3, 3, 4, 6))

    assert batches == [12]
