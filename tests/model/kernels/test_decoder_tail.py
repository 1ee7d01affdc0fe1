"""The decoder's fused end, and the convolution in four phases before it, against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.inference.fuse import SubPixelConvolution, fuse, interleave
from almrr_pipeline.model.kernels.cpu_kernels import spread
from almrr_pipeline.model.kernels.decoder_tail import summarize_phases


def draw_phases(batch: int, channels: int, n: int, m: int) -> list[list[Tensor]]:
    """Random phases whose channels have means and stds of their own."""
    torch.manual_seed(0)
    scale, shift = torch.rand(channels, 1, 1) * 5 + 0.01, torch.randn(channels, 1, 1) * 10
    phases = [
        [torch.randn(batch, channels, n - i, m - j) * scale + shift for j in (0, 1)] for i in (0, 1)
    ]
    return [
        [phase.contiguous(memory_format=torch.channels_last) for phase in row] for row in phases
    ]


@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "n", "m", "size"),
    [
        (1, 64, 1, 5, 5, (16, 16)),
        (3, 70, 2, 4, 9, (12, 40)),
        (2, 1, 3, 2, 2, (3, 3)),
        (1, 200, 1, 20, 20, (64, 64)),
    ],
)
def test_the_fused_end_equals_torchs_operations(
    batch: int, channels: int, outputs: int, n: int, m: int, size: tuple[int, int]
) -> None:
    phases = draw_phases(batch, channels, n, m)
    weight, bias = torch.randn(outputs, channels) / channels, torch.randn(outputs)
    x = interleave(phases).double()
    x = F.interpolate(
        F.instance_norm(x, eps=1e-5).relu(), size=size, mode="bilinear", align_corners=True
    ).tanh()
    expected = F.conv2d(x, weight.double()[:, :, None, None], bias.double())
    given = summarize_phases(phases, weight, bias, size=size, epsilon=1e-5)
    torch.testing.assert_close(given.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("value", [*np.linspace(0.01, 7.8, 40), 7.89, 7.9, 7.91, 8.5, 12.0, 20.0])
def test_tanh_is_exact_to_float_rounding_everywhere(value: float) -> None:
    """One bright cell of 21 x 21, normalized to any value by the choice of epsilon.

    Its distance from the mean is 440 and the variance 440: without an epsilon it would become
    sqrt(440), almost 21, far above the 7.9 where tanh is cut off.
    """
    phases = [[torch.zeros(1, 1, 11 - i, 11 - j) for j in (0, 1)] for i in (0, 1)]
    phases[0][0][0, 0, 0, 0] = 441.0
    epsilon = (440.0 / value) ** 2 - 440.0
    assert epsilon > 0.0
    given = summarize_phases(
        phases, torch.ones(1, 1), torch.zeros(1), size=(21, 21), epsilon=epsilon
    )
    assert float(given[0, 0, 0, 0]) == pytest.approx(np.tanh(value), abs=3e-7)


@pytest.mark.parametrize(("n", "m"), [(20, 20), (3, 7), (2, 2)])
def test_four_phases_equal_a_transposed_convolution(n: int, m: int) -> None:
    torch.manual_seed(0)
    transposed = nn.ConvTranspose2d(5, 6, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 5, n, m)
    given = interleave(SubPixelConvolution(transposed.weight)(x))
    assert given.shape == (2, 6, 2 * n - 1, 2 * m - 1)
    torch.testing.assert_close(given, transposed(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_fused_map_does_not_depend_on_the_kernels(
    build_model, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fuse(build_model(refinement_input="projection", refinement_channels=2))
    with_kernels = fused(images)
    monkeypatch.setattr("almrr_pipeline.inference.fuse.has_numba", lambda: False)
    torch.testing.assert_close(fused(images), with_kernels, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_every_task_is_done_once(tasks: int, set_torch_threads: Callable[[int], None]) -> None:
    done = [0] * tasks

    def work(first: int, last: int, counts: list[int]) -> None:
        for task in range(first, last):
            counts[task] += 1

    set_torch_threads(3)
    spread(work, tasks, done)
    assert done == [1] * tasks
