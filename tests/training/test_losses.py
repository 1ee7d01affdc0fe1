from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from almrr_pipeline.training.losses import focal_loss, reconstruction_loss


def restate_focal_loss(logits: torch.Tensor, mask: torch.Tensor, gamma: float) -> float:
    """-(1 - p_t)^gamma log p_t with p_t from a softmax, a pixel at a time, in double precision."""
    values = []
    for sample, truth in zip(logits.tolist(), mask.tolist(), strict=True):
        for row in range(len(truth)):
            for column in range(len(truth[0])):
                powers = [math.exp(channel[row][column]) for channel in sample]
                p = powers[int(truth[row][column])] / sum(powers)
                values.append(-((1 - p) ** gamma) * math.log(p))
    return sum(values) / len(values)


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1)) > 0.6


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_equals_its_definition(
    logits: torch.Tensor, mask: torch.Tensor, gamma: float
) -> None:
    assert focal_loss(logits, mask, gamma).item() == pytest.approx(
        restate_focal_loss(logits, mask, gamma), rel=1e-5
    )


def test_focal_loss_of_a_hand_worked_pixel() -> None:
    # softmax of (log 3, 0) is (3/4, 1/4); the pixel is anomalous: (3/4)^2 * log 4
    logits = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1)
    assert focal_loss(logits, torch.ones(1, 1, 1), 2.0).item() == pytest.approx(
        0.5625 * math.log(4), rel=1e-6
    )


def test_focal_loss_without_focus_is_the_cross_entropy(
    logits: torch.Tensor, mask: torch.Tensor
) -> None:
    torch.testing.assert_close(
        focal_loss(logits, mask, 0.0), functional.cross_entropy(logits, mask.long())
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_focal_loss_takes_masks_of_any_type(
    logits: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype
) -> None:
    torch.testing.assert_close(
        focal_loss(logits, mask.to(dtype), 2.0), focal_loss(logits, mask, 2.0)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("size", [0.0, 20.0, 1e4])
def test_focal_loss_and_gradient_are_finite_at_extremes(size: float, gamma: float) -> None:
    logits = torch.tensor([[size, -size], [-size, size]]).view(1, 2, 1, 2).requires_grad_()
    loss = focal_loss(
        logits, torch.tensor([[[0, 0]]]), gamma
    )  # one pixel certainly right, one certainly wrong
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert loss.item() == pytest.approx(size if size else (0.5**gamma) * math.log(2), rel=1e-4)


def test_focal_loss_of_half_precision_is_computed_in_float32(
    logits: torch.Tensor, mask: torch.Tensor
) -> None:
    loss = focal_loss(logits.bfloat16(), mask, 2.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, focal_loss(logits.bfloat16().float(), mask, 2.0))


def test_reconstruction_loss_is_the_mean_over_all_elements() -> None:
    target = torch.zeros(2, 3, 1, 1)
    reconstruction = torch.tensor([1.0, 0, 0, 0, 0, 2.0]).view(2, 3, 1, 1)
    assert reconstruction_loss(reconstruction, target).item() == pytest.approx(5 / 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("innermost", [True, False])
def test_reconstruction_loss_of_a_batch_is_exact(dtype: torch.dtype, innermost: bool) -> None:
    """Of as many elements as a training has, where a naive sum in float32 is wrong by 3e-4."""
    torch.manual_seed(0)
    pair = (torch.randn(8, 176, 64, 64).to(dtype) for _ in range(2))
    layout = torch.channels_last if innermost else torch.contiguous_format
    hat, target = (each.contiguous(memory_format=layout) for each in pair)
    loss = reconstruction_loss(hat.requires_grad_(), target)
    expected = functional.mse_loss(hat.detach().double(), target.double())
    coarse = 1e-3 if dtype == torch.bfloat16 else 1e-6  # which rounds the differences
    torch.testing.assert_close(loss.double(), expected, rtol=coarse, atol=0)
    (gradient,) = torch.autograd.grad(loss, hat)
    slope = 2 * (hat.detach().double() - target.double()) / hat.numel()
    if dtype != torch.float16:  # whose smallest number is larger than most of these
        coarse = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(gradient.double(), slope, rtol=coarse, atol=1e-12)
