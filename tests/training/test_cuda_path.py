"""What a GPU runs, without one: on fake CUDA tensors, or by its branches on the CPU.

Autograd does not run on fake CUDA tensors where there is no driver, so that backward passes run on
the CPU with the branches that a GPU takes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch
from lightning.fabric import Fabric
from tiny_training import SIDE, build_model, build_synthetic_set
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from almrr_pipeline.config import TrainSettings
from almrr_pipeline.model import almrr, bimamba, frm, mfrm
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.kernels import composed
from almrr_pipeline.model.kernels.scan.reference import convolve_with_torch
from almrr_pipeline.training import losses
from almrr_pipeline.training.callbacks import LOGGED, History
from almrr_pipeline.training.checkpoints import CheckpointFolder
from almrr_pipeline.training.data import SampleOrder, SyntheticBatches
from almrr_pipeline.training.optim import build_optimizer, clip_gradient
from almrr_pipeline.training.runtime import (
    STOP_EVERY,
    algorithms,
    choose_devices,
    decide_to_stop,
    prefers_channels_last,
    training_environment,
)
from almrr_pipeline.training.train import TrainingStep

Train = Callable[..., pd.DataFrame]
WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique_dim"}
"""Operations whose result the host waits for."""
UNORDERED = {
    "_unsafe_index_put", "gather", "index_add", "index_put", "index_put_", "scatter_add",
    "scatter_add_", "upsample_bilinear2d", "upsample_bilinear2d_backward",
}  # fmt: skip
"""Operations that add on a GPU in an order which changes, or pay for that it does not."""


class Recorder(TorchDispatchMode):
    """Counts the operations that run inside, and those that copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        given, made = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
            for tree in ((args, kwargs), out)
        )
        if given and len(given | made) > 1:
            self.copies.append(f"{name} {given} -> {made}")
        aliases = [one.alias_info for one in func._schema.returns]
        is_view = any(one is not None and not one.is_write for one in aliases)
        if func.namespace == "aten" and not is_view and not name.startswith("empty"):
            self.operations[name] += 1
        return out


def put_fake_tensors(network: nn.Module, device: str) -> nn.Module:
    """Put fake tensors in the place of a network's; inside a FakeTensorMode."""

    def empty(one: Tensor) -> Tensor:
        return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device)

    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                trained = parameter.requires_grad
                module._parameters[name] = nn.Parameter(empty(parameter), trained)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else empty(buffer)
    return network


@pytest.fixture
def autocast_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.amp.autocast_mode.torch.cuda.is_bf16_supported", lambda: True)


@pytest.fixture
def branches_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU take the branches of a GPU."""
    for module in (almrr, frm, mfrm):
        monkeypatch.setattr(module, "resize_bilinear", resize_by_matrices, raising=False)
    monkeypatch.setattr(losses, "reconstruction_loss", losses._SquaredError.apply)


@pytest.fixture
def plain_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single operation in the scan's place."""

    def scan(u: Tensor, *others: Tensor, z: Tensor, **options: Any) -> Tensor:
        return u * z

    def convolve(x: Tensor, *weights: Tensor, reverse: bool, backend: str) -> Tensor:
        return convolve_with_torch(x, *weights, reverse=reverse)

    monkeypatch.setattr(bimamba, "selective_scan", scan)
    monkeypatch.setattr(bimamba, "causal_conv", convolve)


def resize_by_matrices(x: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = (
        composed._make_matrix(*pair, x.device, x.dtype)
        for pair in zip(x.shape[2:], size, strict=True)
    )
    with torch.autocast("cpu", enabled=False):
        return composed.apply_separably(x, rows, columns)


def as_if_compiling() -> Any:
    """While compiling, the model takes no branch that is for CPUs alone."""
    return mock.patch("torch.compiler.is_compiling", return_value=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.usefixtures("autocast_to_cuda")
def test_forward_pass_and_optimizer_stay_on_the_gpu(precision: str) -> None:
    model = build_model(standardize=True).train()
    settings = TrainSettings(precision=precision)
    with FakeTensorMode():
        put_fake_tensors(model, "cuda")
        batch = {
            name: torch.empty(2, SIDE, SIDE, *channels, dtype=torch.uint8, device="cuda")
            for name, channels in (("normal", [3]), ("augmented", [3]), ("mask", []))
        }
        optimizer = build_optimizer(model, settings)
        half = precision == "bf16-mixed"
        step = TrainingStep(model, settings)
        with Recorder() as recorder:
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                loss = step(batch)[0]
            for parameter in model.trainable_parameters():
                parameter.grad = torch.empty_like(parameter)
            norm = nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
            optimizer.step()
        assert {loss.device.type, norm.device.type} == {"cuda"}
        assert loss.dtype == torch.float32
    assert recorder.copies == []
    assert recorder.operations.keys() & WAITING == set()
    assert recorder.operations.keys() & UNORDERED == set()
    assert recorder.operations["_fused_adam_"] == 2


@pytest.mark.parametrize(("precision", "budget"), [("32-true", 830), ("bf16-mixed", 1060)])
@pytest.mark.usefixtures("branches_of_cuda", "plain_scan")
def test_a_step_keeps_to_its_number_of_operations(precision: str, budget: int) -> None:
    """On fake tensors without the scan; the host takes some 6 microseconds for each."""
    model = build_model().train()
    settings = TrainSettings(precision=precision)
    with FakeTensorMode(), as_if_compiling():
        put_fake_tensors(model, "cpu")
        batch: Any = {
            name: torch.empty(2, SIDE, SIDE, *channels, dtype=torch.uint8)
            for name, channels in (("normal", [3]), ("augmented", [3]), ("mask", []))
        }
        step, optimizer = TrainingStep(model, settings), build_optimizer(model, settings)
        with Recorder() as recorder:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = step(batch)[0]
            loss.backward()
            nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0, foreach=True)
        optimizer.step()  # the first one makes the moments
        with recorder:
            optimizer.step()
    assert recorder.operations.total() <= budget
    assert recorder.operations.keys() & UNORDERED == set()


@pytest.mark.usefixtures("autocast_to_cuda")
def test_features_are_half_precision_from_the_backbone_to_the_loss() -> None:
    model = build_model().train()
    with FakeTensorMode():
        put_fake_tensors(model, "cuda")
        images = torch.empty(2, 3, SIDE, SIDE, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            output = model.training_forward(images, images)
    assert {output.target.dtype, output.reconstruction.dtype} == {torch.bfloat16}
    assert output.logits.dtype == torch.float32  # probabilities are resized in float32


@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize("sizes", [((39, 39), (64, 64)), ((2, 3), (4, 7)), ((1, 1), (2, 2))])
def test_resizing_by_matrices_is_torchs(innermost: bool, sizes: Any) -> None:
    x = torch.randn(2, 3, *sizes[0], dtype=torch.float64)
    if innermost:
        x = x.contiguous(memory_format=torch.channels_last)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    given = resize_by_matrices(one, sizes[1])
    expected = functional.interpolate(other, sizes[1], mode="bilinear", align_corners=True)
    torch.testing.assert_close(given, expected)
    for resized in (given, expected):
        resized.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_squared_error_without_copies_is_torchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    given, target = (torch.randn(2, 30, 16, 16, generator=generator).to(dtype) for _ in range(2))
    one, other = given.clone().requires_grad_(), given.clone().requires_grad_()
    loss = losses._SquaredError.apply(one, target)
    expected = functional.mse_loss(other.float(), target.float())
    assert loss.dtype == torch.float32
    rounding = 3e-4 if dtype == torch.bfloat16 else 1e-6  # of the differences
    assert loss.item() == pytest.approx(expected.item(), rel=rounding)
    rounded = (given - target).double().square().mean()
    assert loss.item() == pytest.approx(rounded.item(), rel=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=0.01, atol=1e-9)


@pytest.mark.usefixtures("branches_of_cuda")
def test_the_branches_of_a_gpu_train_as_those_of_a_cpu(
    synthetic_set: Any, train: Train, request: pytest.FixtureRequest
) -> None:
    on_gpu = train(build_model(), synthetic_set, learning_rate=1e-4, log_every=1)
    request.getfixturevalue("monkeypatch").undo()
    on_cpu = train(build_model(), synthetic_set, learning_rate=1e-4, log_every=1)
    pd.testing.assert_frame_equal(on_gpu[:1], on_cpu[:1], rtol=1e-4)
    pd.testing.assert_frame_equal(on_gpu, on_cpu, rtol=0.02)  # rounding grows with the steps


def test_a_batch_costs_one_copy_to_the_device() -> None:
    order = SampleOrder(count=10, batch_size=4, seed=0)
    batches = SyntheticBatches(build_synthetic_set(), order, device=torch.device("meta"))
    with Recorder() as recorder:
        batch = batches[0]
    assert batch["augmented"].shape == (4, SIDE, SIDE, 3)
    assert [copy.split()[0] for copy in recorder.copies] == ["_to_copy"]


@pytest.mark.parametrize(
    ("present", "batch_size", "nodes", "chosen"),
    [
        (3, 8, 1, 2),
        (5, 8, 1, 4),
        (6, 8, 1, 4),
        (8, 8, 1, 8),
        (8, 8, 2, 4),
        (4, 6, 1, 3),
        (2, 7, 1, 1),
        (1, 8, 1, "auto"),
        (0, 8, 1, "auto"),
    ],
)
def test_auto_takes_as_many_gpus_as_divide_the_batch(
    present: int, batch_size: int, nodes: int, chosen: object, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.device_count", lambda: present)
    settings = TrainSettings(batch_size=batch_size, nodes=nodes)
    with caplog.at_level(logging.INFO, logger="almrr_pipeline"):
        assert choose_devices(settings, (256, 256)) == chosen
    assert len(caplog.records) == (chosen != "auto")
    if caplog.records:
        expected = f"{chosen} of {present} GPUs, among which train.batch_size {batch_size}"
        assert expected in caplog.records[0].message


def test_auto_leaves_two_samples_where_one_cannot_be_normalized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert choose_devices(TrainSettings(batch_size=8), (128, 128)) == 4


def test_devices_that_are_named_or_started_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert choose_devices(TrainSettings(batch_size=8, devices=3), (256, 256)) == 3
    assert choose_devices(TrainSettings(batch_size=8, accelerator="cpu"), (256, 256)) == "auto"
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "6")  # by sbatch, which starts one process
    assert choose_devices(TrainSettings(batch_size=8), (256, 256)) == 8
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "12")  # by srun, on two machines
    assert choose_devices(TrainSettings(batch_size=8), (256, 256)) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # by torchrun, and the next
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_devices(TrainSettings(batch_size=8), (256, 256)) == 4


def test_a_notebook_which_cannot_start_processes_leaves_auto_to_lightning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    assert choose_devices(TrainSettings(batch_size=8), (256, 256)) == "auto"


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("tf32", [False, True])
def test_the_callers_precision_of_products_is_readable_and_restored(
    before: str, tf32: bool
) -> None:
    torch.set_float32_matmul_precision(before)
    try:
        with algorithms(deterministic=True, tf32=tf32):
            # Lightning and torch.compile read it, and it raises where flags contradict each other.
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("device", "processes", "asked"),
    [("cuda", 1, 20), ("cpu", 2, 20), ("cuda", 2, 20 // STOP_EVERY)],
)
def test_gpus_ask_each_other_now_and_then_whether_to_stop(
    device: str, processes: int, asked: int
) -> None:
    asking: list[bool] = []

    def reduce(decision: bool, *, all: bool) -> bool:
        asking.append(decision)
        return decision

    strategy = SimpleNamespace(reduce_boolean_decision=reduce)
    fabric: Any = SimpleNamespace(
        world_size=processes, device=torch.device(device), strategy=strategy
    )
    decided = [decide_to_stop(fabric, [15], step) for step in range(1, 21)]
    assert asking == [True] * asked
    assert decided.count(True) == asked


@pytest.fixture
def fabric_of_a_gpu() -> Any:
    """What History asks of Fabric; its tensors stay on the CPU."""
    return SimpleNamespace(device=torch.device("cuda"), is_global_zero=True, world_size=1)


def run_history(fabric: Any, on_metrics: Any, *, steps: int = 6) -> History:
    settings = TrainSettings(steps=steps, log_every=2)
    history = History(settings, fabric, on_metrics)
    with history.show_progress(done=0) as advance:
        for step in range(1, steps + 1):
            history.record(step, torch.full((len(LOGGED),), float(step)), 0.1)
            advance()
    return history


def test_curves_are_reported_from_one_other_thread_in_order(fabric_of_a_gpu: Any) -> None:
    reported: list[tuple[int, float, str]] = []

    def report(step: int, values: Any) -> None:
        reported.append((step, values["loss"], threading.current_thread().name))

    run_history(fabric_of_a_gpu, report)
    assert [one[:2] for one in reported] == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert len({one[2] for one in reported} - {threading.main_thread().name}) == 1


def test_a_report_that_fails_ends_the_training(fabric_of_a_gpu: Any) -> None:
    def fail(step: int, values: Any) -> None:
        raise ConnectionError(f"no server at step {step}")

    with pytest.raises(ConnectionError, match="at step 2"):
        run_history(fabric_of_a_gpu, fail)


def test_a_slow_report_does_not_hold_up_the_steps(fabric_of_a_gpu: Any) -> None:
    history = History(TrainSettings(steps=2, log_every=1), fabric_of_a_gpu, lambda *_: go.wait(30))
    go = threading.Event()
    with history.show_progress(done=0):
        history.record(1, torch.zeros(len(LOGGED)), 0.1)
        history.record(2, torch.zeros(len(LOGGED)), 0.1)
        go.set()
    assert len(history.rows) == 2


def test_a_training_that_fails_does_not_wait_for_reports_that_have_not_begun(
    fabric_of_a_gpu: Any,
) -> None:
    begun, go, reported = threading.Event(), threading.Event(), []

    def report(step: int, values: Any) -> None:
        reported.append(step)
        begun.set()
        go.wait(30)

    history = History(TrainSettings(steps=3, log_every=1), fabric_of_a_gpu, report)

    def train() -> None:
        with history.show_progress(done=0):
            for step in (1, 2, 3):
                history.record(step, torch.zeros(len(LOGGED)), 0.1)
            assert begun.wait(30)
            threading.Timer(0.1, go.set).start()
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        train()
    assert reported == [1]


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_on_a_gpu_is_what_the_precision_says(tf32: bool) -> None:
    def flags() -> list[object]:
        backends: Any = torch.backends
        owners = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        older = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32)  # raise on a mixture
        return [*(one.fp32_precision for one in owners), *older]

    before = flags()
    with algorithms(deterministic=True, tf32=tf32):
        assert flags() == ["tf32" if tf32 else "ieee"] * 3 + [tf32] * 2
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert flags() == before


def test_the_callers_choice_by_the_newer_flags_alone_is_restored() -> None:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"  # the older flag raises from here on
    try:
        with algorithms(deterministic=False):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("setting", "device", "precision", "innermost"),
    [
        ("auto", "cuda", "bf16-mixed", True),
        ("auto", "cuda", "32-true", False),
        ("auto", "cpu", "bf16-mixed", True),
        ("auto", "cpu", "32-true", True),
        (False, "cpu", "32-true", False),
        (False, "cuda", "bf16-mixed", False),
    ],
)
def test_channels_are_innermost_where_convolutions_gain(
    setting: Any, device: str, precision: Any, innermost: bool
) -> None:
    settings = TrainSettings(channels_last=setting, precision=precision)
    assert prefers_channels_last(settings, torch.device(device)) == innermost


def count_graphs(model: ALMRR) -> int:
    """Graphs that torch.compile makes of the training's forward pass in half precision."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.autocast("cpu", torch.bfloat16):
        output = torch.compile(model.train().training_forward, backend=keep)(images, images)
    assert torch.isfinite(output.logits).all()
    return len(graphs)


def test_compiling_gives_one_graph() -> None:
    assert count_graphs(build_model(depth=1)) == 1


@pytest.mark.usefixtures("branches_of_cuda", "plain_scan")
def test_compiling_breaks_at_no_other_place_than_the_scan() -> None:
    assert count_graphs(build_model(standardize=True)) == 1


def test_a_checkpoint_in_the_background_holds_what_was_at_its_step(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, "key")
    layer, optimizer = nn.Linear(3, 3), SimpleNamespace(state_dict=lambda: {"steps": [1]})
    expected = layer.weight.detach().clone()
    path = folder.save(1, {"model": layer, "optimizer": optimizer}, background=True)
    with torch.no_grad():
        layer.weight.zero_()
    folder.wait()
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["model"]["weight"], expected)
    assert (content["step"], content["optimizer"]) == (1, {"steps": [1]})
    assert folder.newest() == path


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("no folder")
    folder = CheckpointFolder(tmp_path, "key")
    folder.save(1, {}, background=True)
    with pytest.raises(OSError, match="key"):
        folder.wait()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "tf32", "bf16-mixed"])
def test_the_host_does_not_wait_for_the_gpu_in_a_step(precision: str, synthetic_set: Any) -> None:
    settings = TrainSettings(batch_size=2, accelerator="gpu", devices=1, precision=precision)
    model = build_model()
    with training_environment(model, settings) as (fabric, _):
        step, optimizer = fabric.setup(
            TrainingStep(model, settings), build_optimizer(model, settings)
        )
        order = SampleOrder(count=10, batch_size=2, seed=0)
        batches = SyntheticBatches(synthetic_set, order, device=fabric.device)
        train_a_step(fabric, model, step, optimizer, batches[0])  # compiles and takes memory
        with no_waiting():
            train_a_step(fabric, model, step, optimizer, batches[1])


def train_a_step(fabric: Fabric, model: ALMRR, step: Any, optimizer: Any, batch: Any) -> None:
    torch.manual_seed(0)
    loss = step(fabric.to_device(batch))[0]
    optimizer.zero_grad()
    fabric.backward(loss)
    clip_gradient(fabric, model, optimizer, 1.0)
    optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.filterwarnings("error:.*does not have a deterministic implementation")
def test_equal_trainings_on_a_gpu_are_bit_identical(
    precision: str, synthetic_set: Any, train: Train
) -> None:
    settings = {"steps": 6, "accelerator": "gpu", "devices": 1, "precision": precision}
    one, other = build_model(), build_model()
    histories = [train(each, synthetic_set, **settings) for each in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    assert [name for (name, a), b in pairs if not torch.equal(a, b)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resizing_and_loss_of_a_gpu_are_those_of_a_cpu(dtype: torch.dtype) -> None:
    x = torch.rand(2, 8, 39, 39).to(dtype)
    expected = functional.interpolate(x.float(), (64, 64), mode="bilinear", align_corners=True)
    tolerances = {torch.float32: 1e-5, torch.bfloat16: 0.02}
    for innermost in (torch.contiguous_format, torch.channels_last):
        on_gpu = x.cuda().contiguous(memory_format=innermost)
        with algorithms(deterministic=True), torch.inference_mode():
            composed.resize_bilinear(on_gpu, (64, 64))  # what it keeps can be differentiated
        with algorithms(deterministic=True), torch.autocast("cuda", torch.bfloat16):
            given = composed.resize_bilinear(on_gpu.requires_grad_(), (64, 64))
        given.float().sum().backward()
        assert given.dtype == dtype
        torch.testing.assert_close(given.float().cpu(), expected, rtol=0, atol=tolerances[dtype])
    target = torch.rand(2, 8, 64, 64).to(dtype).cuda()
    loss = losses.reconstruction_loss(given.detach(), target)
    assert loss.item() == pytest.approx(
        functional.mse_loss(given.detach().float(), target.float()).item(), rel=1e-3
    )


@pytest.mark.gpu
def test_auto_devices_train_on_one_gpu(synthetic_set: Any, train: Train) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("several processes would start")
    history = train(build_model(), synthetic_set, accelerator="auto", devices="auto", batch_size=3)
    assert history["loss"].notna().all()
