"""The fused model gives the unfused model's map, part by part and as a whole."""

from __future__ import annotations

import logging

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from almrr_pipeline.inference.fuse import (
    EmbedThenResize,
    FusedALMRR,
    ResizeThenEmbed,
    fuse,
)
from almrr_pipeline.model.fused_backbone import absorb_padding, fuse_batch_norms
from almrr_pipeline.training.runtime import algorithms

SIZE = (128, 160)
KINDS = [
    {},
    {"standardize": True},
    {"refinement_input": "projection", "refinement_channels": 3, "standardize": True},
    {"residual_channels": 2, "standardize": True},
    {"fine_channels": 3, "standardize": True},
    {"memory_size": 8, "posterior_gamma": 2.0, "standardize": True},
    {"memory_size": 8, "memory_input": False, "memory_exponent": 3.0, "standardize": True},
]
NAMES = ["mean", "standardized", "projection", "residual", "fine", "memory", "evidence"]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_fusing_is_exact(build_model, images: Tensor, patch: int, kind: dict[str, object]) -> None:
    """In float64, where rounding cannot hide a mistake."""
    model = build_model(patch=patch, **kind).double()
    with torch.no_grad():
        expected = model(images.double())
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(fuse(model)(images.double()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_in_float32_the_fused_map_is_within_1e_4_of_the_exact_one(
    build_model, images: Tensor, kind: dict[str, object]
) -> None:
    """Exact: the plain model in float64; in float32 it rounds differently on each processor."""
    model = build_model(**kind)
    fused = fuse(model)(images)
    with torch.no_grad():
        plain = model(images).double()
        exact = model.double()(images.double())
    difference = fused.double() - exact
    # Single pixels behind a fine path or distances (a root near 0) depend on how a processor
    # rounds: up to 2.6e-4 was seen. All pixels together had 1e-6 to 1.4e-5, fused or not.
    coarse = "fine_channels" in kind or "memory_size" in kind
    assert float(difference.abs().max()) < (1e-3 if coarse else 1e-4)
    assert float(difference.square().mean().sqrt()) < 4e-5
    assert float((plain - exact).square().mean().sqrt()) < 4e-5


@pytest.mark.parametrize(
    ("backbone", "location"),
    [
        ("test_efficientnet", "bottleneck"),
        ("tf_efficientnet_lite0", "expansion"),
        ("resnet18", "bottleneck"),
    ],
)
def test_every_backbone_fuses(
    build_model, images: Tensor, backbone: str, location: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, images = build_model(backbone, location).double(), images.double()
    with torch.no_grad():
        expected = model(images)
    fused = fuse(model)
    torch.testing.assert_close(fused(images), expected, rtol=0, atol=1e-9)
    assert not any(isinstance(each, nn.BatchNorm2d | Conv2dSame) for each in fused.modules())
    assert caplog.records == []


def test_fusing_under_autocast_folds_the_same(build_model) -> None:
    model = build_model().eval()
    plain = fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        fused = fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, fused.state_dict()[name]), name


def test_both_orders_of_a_stage_agree() -> None:
    torch.manual_seed(0)
    weight, rows, columns = torch.randn(5, 7, 4, 4), torch.rand(12, 6), torch.rand(16, 3)
    x = torch.randn(2, 7, 6, 3)
    given = [kind(weight, rows, columns)(x) for kind in (ResizeThenEmbed, EmbedThenResize)]
    assert given[0].shape == (2, 12, 5)
    torch.testing.assert_close(given[0], given[1], rtol=1e-4, atol=1e-3)


def test_the_cheaper_order_is_taken_for_each_stage(build_model) -> None:
    orders = {
        patch: [type(stage) for stage in fuse(build_model(patch=patch)).embedding.stages]
        for patch in (1, 2, 4)
    }
    assert orders == {
        4: [ResizeThenEmbed, ResizeThenEmbed, EmbedThenResize],
        2: [ResizeThenEmbed, EmbedThenResize, EmbedThenResize],
        1: [EmbedThenResize, EmbedThenResize, EmbedThenResize],
    }


def test_fusing_leaves_the_callers_random_state_alone(build_model) -> None:
    model = build_model()
    before = torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_fusing_leaves_the_model_alone(build_model) -> None:
    model, images = build_model(), torch.rand(1, 3, *SIZE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fuse(model)
    expected = fused(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.trainable_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fused(images), expected)


def test_a_model_in_training_folds_to_its_evaluation(build_model, images: Tensor) -> None:
    model, images = build_model(drop_path=0.5).double(), images.double()
    with torch.no_grad():
        expected = model(images)
    fused = fuse(model.train())
    torch.testing.assert_close(fused(images), expected, rtol=0, atol=1e-9)
    assert not any(module.training for module in fused.modules())


def test_the_fused_map_carries_no_gradient(build_model) -> None:
    fused: FusedALMRR = fuse(build_model())
    assert not fused(torch.rand(1, 3, *SIZE)).requires_grad
    assert not any(parameter.requires_grad for parameter in fused.parameters())


class _TwiceUsed(nn.Module):
    """One convolution, two norms: nothing that can be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.convolution(self.first(self.convolution(x))))


def test_what_cannot_be_fused_stays_as_it_is_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network, x = _TwiceUsed().eval(), torch.randn(2, 3, 4, 4)
    nn.init.normal_(network.first.running_mean)
    with caplog.at_level(logging.WARNING):
        fused = fuse_batch_norms(network, x)
    assert torch.equal(fused(x), network(x))
    assert "_TwiceUsed cannot be fused" in caplog.text


@pytest.mark.parametrize("sides", [(32, 32), (33, 40), (31, 17)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (2, 2), (1, 2), (3, 1), (3, 3)])
def test_a_kernel_pads_as_the_copy_did(sides: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Conv2dSame(4, 8, kernel, stride, groups=2)).double().eval()
    x = torch.randn(2, 4, *sides).double()
    expected = network(x)
    absorbed = absorb_padding(network, x)
    assert type(absorbed[0]) is nn.Conv2d
    torch.testing.assert_close(absorbed(x), expected, rtol=0, atol=1e-12)


def test_a_convolution_of_maps_of_two_sizes_keeps_its_copy() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = Conv2dSame(3, 3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(self.convolution(x))

    network, x = Twice().eval(), torch.randn(1, 3, 18, 18)
    expected = network(x)
    assert torch.equal(absorb_padding(network, x)(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_the_fused_map_is_the_same_on_a_gpu(
    build_model, images: Tensor, kind: dict[str, object]
) -> None:
    """Fused while TF32 is on, as it is by default; compared in full float32."""
    with torch.no_grad():
        exact = build_model(**kind).double()(images.double())
    fused = fuse(build_model(**kind).to("cuda"))
    assert all(tensor.is_cuda for tensor in (*fused.parameters(), *fused.buffers()))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with algorithms(deterministic=True):
        given = fused(images.to("cuda"))
    torch.testing.assert_close(given.cpu().double(), exact, rtol=0, atol=1e-3)
