from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.model.kernels import pointwise
from almrr_pipeline.model.kernels.pointwise import convolve_pointwise, mix_residuals


def draw(*shape: int, innermost: bool = True) -> Tensor:
    x = torch.randn(*shape, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if innermost else x


def compare_gradients(given: Tensor, expected: Tensor, parameters: list[Tensor]) -> None:
    slope = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(given, parameters, slope),
        torch.autograd.grad(expected, parameters, slope),
        strict=True,
    )
    for own, plain in pairs:
        torch.testing.assert_close(own, plain)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("innermost", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_pointwise_convolution_is_one(innermost: bool, with_bias: bool) -> None:
    x = draw(2, 7, 5, 6, innermost=innermost).requires_grad_()
    weight = draw(3, 7, 1, 1).requires_grad_()
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if with_bias else None
    given, expected = convolve_pointwise(x, weight, bias), F.conv2d(x, weight, bias)
    torch.testing.assert_close(given, expected, check_stride=True)
    parameters = [each for each in (x, weight, bias) if each is not None]
    compare_gradients(given, expected, parameters)


@pytest.mark.parametrize("block", [1, 7 * 9, 1 << 16])
@pytest.mark.parametrize("innermost", [True, False])
def test_mixed_residuals_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, block: int, innermost: bool
) -> None:
    """Forward and backward, in blocks of one cell, of nine, and in one."""
    monkeypatch.setattr(pointwise, "_BLOCK", block)
    features = draw(2, 7, 5, 6, innermost=innermost)
    hat = draw(2, 7, 5, 6, innermost=innermost).requires_grad_()
    weight = draw(3, 7, 1, 1).requires_grad_()
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    given = mix_residuals(features, hat, weight, bias)
    expected = F.conv2d((features - hat).square().add(1).log(), weight, bias)
    torch.testing.assert_close(given, expected)
    compare_gradients(given, expected, [hat, weight, bias])


def test_features_that_have_a_gradient_get_it() -> None:
    features = draw(1, 4, 3, 3).requires_grad_()
    hat, weight = draw(1, 4, 3, 3), draw(2, 4, 1, 1)
    bias = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mix_residuals(x, hat, weight, bias), features)


def test_half_precision_does_not_overflow_before_the_logarithm() -> None:
    features = torch.full((1, 4, 2, 2), 3e4, dtype=torch.float16)
    weight, bias = torch.ones(1, 4, 1, 1, dtype=torch.float16), torch.zeros(1, dtype=torch.float16)
    mixed = mix_residuals(features, -features, weight, bias)
    expected = 4 * torch.log1p(torch.tensor(6e4) ** 2)
    torch.testing.assert_close(mixed.float(), expected.expand(1, 1, 2, 2), rtol=1e-2, atol=0)
