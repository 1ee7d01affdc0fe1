"""On a CPU several batches are mapped at a time, with the results of one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import Tiling
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.map_predictor import MapPredictor
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.inference.runtimes import ExportedNetwork
from almrr_pipeline.inference.threads import batches_at_once, start_torch_workers

SIZE = (16, 16)
WHOLE = Tiling()


@pytest.fixture(autouse=True)
def two_threads(set_torch_threads: Callable[[int], None]) -> None:
    """Torch may use two threads, whatever the machine."""
    set_torch_threads(2)


class Recorder(nn.Module):
    """Gives the red channel, and notes by which thread and with how many of torch's threads."""

    def __init__(self, *, meet: int = 0, broken_from: int = 256) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []
        self.meeting = threading.Barrier(meet, timeout=20) if meet else None
        self.broken_from = broken_from

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((threading.get_ident(), torch.get_num_threads()))
        if self.meeting:
            self.meeting.wait()  # broken unless so many calls are under way at once
        red = images[:, 0]
        return red / (red < self.broken_from / 255)


def _images(number: int) -> list[ImageArray]:
    return [np.full((*SIZE, 3), value, np.uint8) for value in range(number)]


def _predictor(
    model: nn.Module, *, tiling: Tiling = WHOLE, concurrent: bool = True
) -> MapPredictor:
    """In batches of two."""
    return MapPredictor(model.eval(), SIZE, tiling, 2, torch.device("cpu"), concurrent=concurrent)


def _torch_threads_of_a_new_thread() -> int:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_two_batches_are_mapped_at_a_time_by_one_thread_each() -> None:
    model = Recorder(meet=2)
    maps = [found.anomaly_map for found in _predictor(model).maps(_images(8))]
    assert len(model.calls) == 4
    assert {number for _, number in model.calls} == {1}
    assert threading.get_ident() not in {thread for thread, _ in model.calls}
    np.testing.assert_allclose([one[0, 0] * 255 for one in maps], range(8), atol=1e-4)


def test_torchs_threads_stay_as_they_were_elsewhere() -> None:
    for number in (2, 3):
        torch.set_num_threads(number)
        for _ in _predictor(Recorder()).maps(_images(8)):
            assert torch.get_num_threads() == number
            assert _torch_threads_of_a_new_thread() == number


def test_a_single_batch_has_all_threads() -> None:
    model = Recorder()
    assert len(list(_predictor(model).maps(_images(2)))) == 2
    assert model.calls == [(threading.get_ident(), 2)]


def test_one_thread_maps_batch_after_batch_in_the_callers() -> None:
    torch.set_num_threads(1)
    model = Recorder()
    list(_predictor(model).maps(_images(6)))
    assert model.calls == [(threading.get_ident(), 1)] * 3


def test_a_model_that_needs_an_order_is_called_batch_after_batch() -> None:
    model = Recorder()
    list(_predictor(model, concurrent=False).maps(_images(6)))
    assert model.calls == [(threading.get_ident(), 2)] * 3


@pytest.mark.parametrize("cores", [8, 10])
def test_more_threads_are_shared_by_four_batches(cores: int) -> None:
    torch.set_num_threads(cores)
    assert batches_at_once() == 4
    model = Recorder(meet=4)
    list(_predictor(model).maps(_images(16)))
    assert {number for _, number in model.calls} == {2}


def test_maps_are_those_of_one_thread_to_the_bit(model_folder: Path) -> None:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (70, 50 + i, 3), np.uint8) for i in range(7)]
    predictor = Predictor(model_folder, device="cpu", batch_size=2)
    together = [one.anomaly_map for one in predictor(images)]
    torch.set_num_threads(1)
    alone = [one.anomaly_map for one in predictor(images)]
    assert np.std(alone[0]) > 0
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.xdist_group("export")  # the fixture's graph is made once
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_are_called_by_several_threads(
    runtime: str, onnx_file_of_model_folder: Path, model_folder: Path
) -> None:
    pytest.importorskip(runtime)
    network = ExportedNetwork(onnx_file_of_model_folder, runtime)
    size = InferenceConfig.load(model_folder).image_size
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*size, 3), np.uint8) for _ in range(12)]
    predictor = MapPredictor(network, size, WHOLE, 1, torch.device("cpu"))
    together = [one.anomaly_map for one in predictor.maps(images)]
    alone = [next(predictor.maps([image])).anomaly_map for image in images]
    assert np.std(alone[0]) > 0
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_tiles_of_an_image_blend_in_their_order() -> None:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (61, 90, 3), np.uint8) for _ in range(3)]
    tiling = Tiling(enabled=True, overlap=0.4)
    maps = [found.anomaly_map for found in _predictor(Recorder(), tiling=tiling).maps(images)]
    for image, found in zip(images, maps, strict=True):
        np.testing.assert_allclose(found, image[..., 0] / 255, atol=1e-6)


def test_an_error_comes_at_its_batchs_turn() -> None:
    maps = _predictor(Recorder(broken_from=3)).maps(_images(8))  # in the second of four batches
    assert [next(maps).index, next(maps).index] == [0, 1]
    with pytest.raises(AlmrrError, match="not finite"):
        next(maps)


def test_an_unreadable_image_is_reported_in_its_turn() -> None:
    images = _images(8)
    images[3] = np.zeros((2, 2), np.uint8)
    seen: list[int | None] = []
    maps = _predictor(Recorder()).maps(images, on_unreadable=lambda *_: seen.append(None))
    for found in maps:
        seen.append(found.index)
    assert seen == [0, 1, 2, None, 4, 5, 6, 7]


def test_batches_in_flight_are_bounded() -> None:
    model = Recorder()
    drawn: list[int] = []

    def draw() -> Iterator[ImageArray]:
        for image in _images(200):
            drawn.append(len(drawn))
            yield image

    maps = _predictor(model).maps(draw())
    next(maps)
    assert len(model.calls) <= 1 + 2  # the first batch, and two that are under way
    assert len(drawn) <= 2 * (1 + 2) + 2 * 2 + 1  # theirs, and two batches that are decoded ahead
    maps.close()  # type: ignore[attr-defined]
    assert len(model.calls) <= 1 + 2


def test_closing_early_ends_the_threads() -> None:
    before = threading.active_count()
    maps = _predictor(Recorder()).maps(_images(40))
    next(maps)
    assert threading.active_count() > before
    maps.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_workers_of_several_callers_have_the_threads_that_each_asked_for() -> None:
    meeting, found = threading.Barrier(3), {}

    def use(number: int) -> None:
        meeting.wait()
        with start_torch_workers(2, threads=number) as workers:
            found[number] = [workers.submit(torch.get_num_threads).result() for _ in range(4)]

    callers = [threading.Thread(target=use, args=(number,)) for number in (1, 3, 5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == {number: [number] * 4 for number in (1, 3, 5)}
    assert torch.get_num_threads() == _torch_threads_of_a_new_thread() == 2
