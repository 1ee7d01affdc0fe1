"""The model of cost counts what is known by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812

from almrr_pipeline.config import ModelSettings

SMALL = ModelSettings(latent=16, dim=16, depth=2, state=4, decoder=(8, 8), refinement_width=4)


@pytest.fixture
def cost(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("cost")


def count(cost: ModuleType, run: Callable[[], object]) -> list:
    """The operations of a function on fake tensors."""
    with FakeTensorMode(), cost.Counter() as counter:
        run()
    return counter.operations


def test_a_convolution_has_its_flop_and_bytes(cost: ModuleType) -> None:
    def convolve() -> None:
        F.conv2d(torch.empty(2, 3, 10, 10), torch.empty(5, 3, 3, 3))

    (one,) = [each for each in count(cost, convolve) if each.name == "convolution"]
    assert one.flop == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)  # a multiplication and an addition each
    assert one.moved == 4 * (2 * 3 * 10 * 10 + 5 * 3 * 3 * 3 + 2 * 5 * 8 * 8)
    assert one.unit == "product"


def test_a_product_in_bfloat16_is_of_tensor_cores(cost: ModuleType) -> None:
    half = torch.bfloat16
    (one,) = count(cost, lambda: torch.empty(4, 8, dtype=half) @ torch.empty(8, 6, dtype=half))
    assert (one.flop, one.moved, one.unit) == (2 * 4 * 8 * 6, 2 * (32 + 48 + 24), "bfloat16")


def test_elements_are_read_and_written_once(cost: ModuleType) -> None:
    def compute() -> None:
        a, b = torch.empty(100), torch.empty(100)
        a + b  # 3 x 400 bytes
        a.add_(b)  # as many: a read and written, b read
        a.copy_(b)  # without reading a
        a.expand(7, 100) * 2  # 400 read, 2800 written
        a.view(10, 10).t()  # nothing

    moved = [one.moved for one in count(cost, compute)]
    assert moved == [1200, 1200, 800, 3200]


def test_an_index_reads_what_it_returns(cost: ModuleType) -> None:
    def compute() -> None:
        torch.empty(1000, 8).index_select(0, torch.zeros(5, dtype=torch.int64))

    one = count(cost, compute)[-1]
    assert one.moved == 2 * 5 * 8 * 4 + 5 * 8


def test_a_backward_convolution_costs_twice_the_forward_one(cost: ModuleType) -> None:
    def compute() -> None:
        x = torch.empty(2, 3, 10, 10, requires_grad=True)
        F.conv2d(x, torch.empty(5, 3, 3, 3, requires_grad=True)).sum().backward()

    flop = {one.name: one.flop for one in count(cost, compute)}
    assert flop["convolution_backward"] == 2 * flop["convolution"]


def test_the_time_is_that_of_the_term_that_bounds(cost: ModuleType) -> None:
    device = cost.Device("one", {"bfloat16": 1e12, "tf32": 1e11, "float32": 1e10}, 1e12)
    rate, reached = cost.REACHED["rates"], cost.REACHED["bandwidth"]

    def modelled(flop: float, moved: int, unit: str, *, tf32: bool = False) -> float:
        return cost.model_time([cost.Operation("x", flop, moved, unit)], device, tf32=tf32).device

    assert modelled(1e12, 10, "bfloat16") == pytest.approx(1 / rate)
    assert modelled(1e12, 10, "product", tf32=True) == pytest.approx(10 / rate)
    assert modelled(1e12, 10, "product") == pytest.approx(100 / rate)
    assert modelled(10, 10**12, "bfloat16") == pytest.approx(1 / reached)
    assert modelled(1, 1, "bfloat16") == cost.SHORTEST


def test_a_step_and_inference_are_counted_whole(cost: ModuleType) -> None:
    options = {"model": SMALL, "size": (128, 128), "backbone": "test_resnet"}
    step = cost.count_step(2, "float32", **options)
    names = [one.name for one in step.operations]
    # Two directions in each of two blocks, forward and backward.
    assert (names.count("scan forward"), names.count("scan backward")) == (4, 4)
    assert "_fused_adam_" in names
    (scan, *_) = [one for one in step.operations if one.name == "scan forward"]
    b, tokens, channels, states = 2, 64, 32, 4
    assert scan.flop == cost.SCAN_FLOP["forward"] * b * tokens * channels * states
    rows = 4 * (4 * b * tokens * channels + 2 * b * tokens * states)
    assert scan.moved == rows + 4 * b * (tokens // cost.TILE) * states * channels
    half = cost.count_step(2, "bfloat16", **options)
    assert half.flop() == pytest.approx(step.flop(), rel=0.1)
    inference = cost.count_inference(2, "float32", **options)
    assert 0 < inference.flop() < step.flop()
    assert inference.moved() < step.moved()
    four = cost.count_inference(4, "float32", **options)
    assert four.flop() == pytest.approx(2 * inference.flop(), rel=0.02)


def test_a_scan_s_launches_are_those_of_the_kernels(cost: ModuleType) -> None:
    triton_backend = pytest.importorskip("almrr_pipeline.model.kernels.scan.triton_backend")
    constants = (triton_backend._TILE, triton_backend._BLOCK_D, triton_backend._PROGRAMS)
    assert constants == (cost.TILE, cost.BLOCK_D, cost.PROGRAMS)
    # Batch 4: 4 x 48 blocks of channels give 1536 programs in 8 spans of 4 tiles each.
    summary, scan = cost.launch_scan("forward", "float32", 4, 256, 384, 16)
    assert triton_backend._count_spans(torch.empty(4, 256, 384, device="meta"), 16) == 8
    assert (summary.warps, scan.warps) == (1536, 1536)
    assert summary.instructions == 227 + 4 * 333
    assert scan.instructions == 286 + 4 * 570 + 7 * 40 // 2  # 3.5 spans before its own on average
    # u, delta, z, out; B, C; the states before 32 tiles; the summaries of 8 spans
    moved = 4 * 4 * 256 * 384 * 4 + 2 * 4 * 256 * 16 * 4 + (32 + 8) * 4 * 384 * 16 * 4
    assert scan.moved == moved
    # Batch 32 fills the GPU without spans.
    (alone,) = cost.launch_scan("forward", "bfloat16", 32, 256, 384, 16)
    assert (alone.warps, alone.instructions) == (1536, 288 + 32 * 592)
    (theirs,) = cost.launch_mamba("forward", "float32", 4, 256, 384, 16)
    assert (theirs.warps, theirs.instructions) == (1536, 625 + 16 * 159)


def test_the_modelled_scan_is_near_mamba_ssm_s(
    cost: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    cost.print_scans([4])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[2].strip() for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        ours, theirs = (float(cell.split("/")[1]) for cell in row[3:5])
        assert ours <= 3 * theirs
        assert float(row[5]) == pytest.approx(ours / theirs, abs=0.01)
    device = cost.DEVICES[1]
    issued = cost.Launch(warps=cost.SCHEDULERS, instructions=175_500).time(device)
    alone = cost.Launch(warps=1, instructions=175_500).time(device)
    assert issued == alone == pytest.approx(1e-4)  # one instruction a cycle at 1.755 GHz
    assert cost.Launch(warps=1, instructions=1).time(device) == cost.SHORTEST
