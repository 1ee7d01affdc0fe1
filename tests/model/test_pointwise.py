from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

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


def list_operations(x: Tensor) -> str:
    """The names of a result's last three operations, which autograd keeps."""
    names: list[str] = []
    node = x.grad_fn
    while node is not None and len(names) < 3:
        names.append(node.name())
        node = node.next_functions[0][0]
    return " ".join(names)


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


@pytest.mark.parametrize("innermost", [True, False])
def test_mixed_residuals_are_those_of_the_formula(innermost: bool) -> None:
    """In float64, which the CPU's kernels do not take."""
    features = draw(2, 7, 5, 6, innermost=innermost)
    hat = draw(2, 7, 5, 6, innermost=innermost).requires_grad_()
    weight = draw(3, 7, 1, 1).requires_grad_()
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    given = mix_residuals(features, hat, weight, bias)
    expected = F.conv2d((features - hat).square().add(1).log(), weight, bias)
    torch.testing.assert_close(given, expected)
    compare_gradients(given, expected, [hat, weight, bias])


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 5, 6), (3, 176, 20, 30)])
def test_mixed_residuals_by_kernels_round_once(
    own: torch.dtype, other: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Against float64, in which the result is rounded to the type of F_hat; up to four tasks."""
    scale = 10 ** draw(*shape)  # differences from 1e-4 to 1e4
    features, hat = (draw(*shape) * scale).to(own), (draw(*shape) * scale).to(other)
    weight, bias = draw(8, shape[1], 1, 1).float(), torch.randn(8)
    leaves = [x.requires_grad_() for x in (hat, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    given = mix_residuals(features, *leaves)
    expected = mix_residuals(features.double(), *exact)
    assert given.dtype == other
    assert "MixedResiduals" in list_operations(given)
    precision = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[other]
    torch.testing.assert_close(given.double(), expected, rtol=precision, atol=1e-5)
    slope = torch.randn_like(given)
    pairs = zip(
        torch.autograd.grad(given, leaves, slope),
        torch.autograd.grad(expected, exact, slope.double()),
        leaves, strict=True,
    )  # fmt: skip
    for gradient, plain, leaf in pairs:
        assert gradient.dtype == leaf.dtype
        accurate = precision if leaf is leaves[0] else 1e-5
        torch.testing.assert_close(gradient.double(), plain, rtol=accurate, atol=1e-3)


def test_a_residual_that_is_not_finite_stays_so() -> None:
    features, hat = draw(1, 4, 2, 2).float(), draw(1, 4, 2, 2).float()
    hat[0, 1, 0, 1] = torch.nan
    mixed = mix_residuals(features, hat, torch.ones(2, 4, 1, 1), torch.zeros(2))
    assert mixed.isnan().sum() == 2
    assert mixed[0, :, 0, 1].isnan().all()


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
