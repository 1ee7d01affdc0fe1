"""What surrounds the training loop: devices, torch's global state, SIGTERM, errors explained."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import TrainSettings
from almrr_pipeline.model.almrr import ALMRR

logger = logging.getLogger(__name__)

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable; cuBLAS is reproducible only with a workspace of fixed size."""
DEEPEST_STRIDE = 128
"""Of the FRM's innermost map relative to the image: features at 4, then five halvings."""
STOP_EVERY = 10
"""Steps between two decisions of several GPUs whether to stop: each one waits for all of them."""
LAUNCHED = (
    ("LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"),
)
"""Environment variables: the number of processes that torchrun or SLURM started on a machine, and
one that only such processes have (sbatch sets the number before it starts any)."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""In the messages of RuntimeErrors by which torch reports that memory ran out."""


@contextmanager
def training_environment(
    model: ALMRR, settings: TrainSettings
) -> Iterator[tuple[Fabric, list[int]]]:
    """Processes, precision, torch's settings and signals of a training; all restored afterwards.

    Inside, the model is in training mode; afterwards it is in evaluation mode on the CPU.
    """
    with (
        quiet_libraries(),
        isolated_randomness(),
        algorithms(deterministic=settings.deterministic, tf32=settings.precision == "tf32"),
        deferred_sigterm() as stop,
    ):
        fabric = build_fabric(settings, model.image_size)
        check_processes(settings, fabric.world_size, model.image_size)
        compiling = explain_compile_errors() if settings.compile else nullcontext()
        try:
            model.train()
            if prefers_channels_last(settings, fabric.device):
                model.to(memory_format=torch.channels_last)
            with explain_out_of_memory(settings, fabric.world_size), compiling:
                fabric.launch()
                yield fabric, stop
        finally:
            model.eval().cpu().to(memory_format=torch.contiguous_format)


def prefers_channels_last(settings: TrainSettings, device: torch.device) -> bool:
    """Whether images and weights shall have their channels innermost.

    `auto`: on a CPU, whose features the model arranges so by itself, and on GPUs in half precision,
    whose tensor cores need it. In float32 cuDNN's convolutions do not gain.
    """
    if settings.channels_last == "auto":
        return device.type == "cpu" or (
            device.type == "cuda" and settings.precision.endswith("mixed")
        )
    return settings.channels_last


def choose_devices(settings: TrainSettings, image_size: tuple[int, int]) -> int | str:
    """`devices`; for `auto` the largest number of GPUs among which a batch can be divided."""
    if settings.devices != "auto":
        return settings.devices
    for name, started in LAUNCHED:
        if started in os.environ and os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    present = torch.cuda.device_count()
    on_gpus = settings.accelerator in ("auto", "gpu", "cuda")
    interactive = hasattr(sys, "ps1")  # Lightning's `auto` is one GPU there: it cannot start others
    if not on_gpus or present < 2 or interactive:
        return "auto"
    numbers = range(present, 0, -1)
    suiting = (n for n in numbers if not misfit(settings, n * settings.nodes, image_size))
    chosen = next(suiting, 1)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        line = "Training on %d of %d GPUs, among which train.batch_size %d can be divided."
        logger.info(line, chosen, present, settings.batch_size)
    return chosen


def build_fabric(settings: TrainSettings, image_size: tuple[int, int]) -> Fabric:
    """Fabric for the settings' devices, which starts no process yet; AlmrrError without them."""
    try:
        return Fabric(
            accelerator=settings.accelerator,
            devices=choose_devices(settings, image_size),
            num_nodes=settings.nodes,
            precision="32-true" if settings.precision == "tf32" else settings.precision,
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
        names = ("accelerator", "devices", "nodes", "precision")
        requested = ", ".join(f"{name} {getattr(settings, name)}" for name in names)
        raise AlmrrError(
            f"Cannot train with {requested}: {error} Change them in the train section."
        ) from error


def check_processes(settings: TrainSettings, world_size: int, image_size: tuple[int, int]) -> None:
    """Raise an AlmrrError if the batch size does not suit the number of processes.

    Also if this process has taken part in a distributed training before: its process group remains.
    """
    batch_size = settings.batch_size
    if world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise AlmrrError(
            "This process has taken part in a distributed training before and cannot start another "
            f"one on {world_size} devices: train one category and seed per process, with "
            "`kedro run --pipelines train --namespaces CATEGORY.seed_N` or `dvc repro train`, or "
            "set train.devices to 1."
        )
    if fault := misfit(settings, world_size, image_size):
        raise AlmrrError(f"train.batch_size {batch_size} {fault}.")


def misfit(settings: TrainSettings, world_size: int, image_size: tuple[int, int]) -> str:
    """Why a batch cannot be divided among so many devices, and what to take; "" if it can."""
    batch_size = settings.batch_size
    if batch_size % world_size:
        return (
            f"cannot be divided equally among {world_size} devices; "
            f"take {max(1, round(batch_size / world_size)) * world_size}"
        )
    rows, columns = (side // DEEPEST_STRIDE for side in image_size)
    if batch_size // world_size * rows * columns < 2:
        return (
            f"leaves {world_size} devices one sample each, which the FRM's batch normalization "
            f"cannot work with at {image_size[0]}x{image_size[1]}; take {2 * world_size}"
        )
    return ""


def decide_to_stop(fabric: Fabric, stop: list[int], step: int) -> bool:
    """Whether any process was asked to end: the same answer in all, after the same step.

    On GPUs the processes ask each other every `STOP_EVERY` steps only.
    """
    if fabric.world_size > 1 and fabric.device.type != "cpu" and step % STOP_EVERY:
        return False
    return fabric.strategy.reduce_boolean_decision(bool(stop), all=False)


@contextmanager
def deferred_sigterm() -> Iterator[list[int]]:
    """Put SIGTERM into a list instead of ending, so that a training can write a checkpoint first.

    One that comes when the training is done takes effect afterwards. In other threads than the main
    one, which cannot handle signals, nothing changes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if received:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def isolated_randomness() -> Iterator[None]:
    """Leave torch's random generators as they were before."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def algorithms(*, deterministic: bool, tf32: bool = False) -> Iterator[None]:
    """Choose torch's algorithms, and restore the choice afterwards.

    Deterministic: an operation without a deterministic form, which only GPUs have, warns and runs.
    Otherwise cuDNN tries its convolutions and keeps the fastest. `tf32`: whether a GPU's products
    and convolutions of float32 may round their operands to 10 bits, as cuDNN does by default.
    """
    with ExitStack() as stack:
        matmul: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        with suppress(RuntimeError):
            precision = torch.get_float32_matmul_precision()
            if (precision != "highest") == (matmul.fp32_precision == "tf32"):
                # Restored last: it sets what the others do, and a CPU's flags.
                stack.callback(torch.set_float32_matmul_precision, precision)
        for owner in (matmul, cudnn.conv, cudnn.rnn):
            stack.callback(setattr, owner, "fp32_precision", owner.fp32_precision)
        # The older flags, which torch.compile and Lightning read, raise if they disagree with the
        # newer ones: then the caller has set the newer ones alone.
        for owner in (matmul, cudnn):
            with suppress(RuntimeError):
                stack.callback(setattr, owner, "allow_tf32", owner.allow_tf32)
        torch.set_float32_matmul_precision("highest")  # sets a CPU's flags too
        for owner in (matmul, cudnn):
            owner.allow_tf32 = tf32
        for owner in (matmul, cudnn.conv, cudnn.rnn):
            owner.fp32_precision = "tf32" if tf32 else "ieee"
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        for owner, name, value in (
            (cudnn, "benchmark", not deterministic),
            (cudnn, "deterministic", deterministic),
            # Memory that is never read before it is written need not be filled, which costs time.
            (torch.utils.deterministic, "fill_uninitialized_memory", False),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        if deterministic and CUBLAS not in os.environ:
            os.environ[CUBLAS] = ":4096:8"
            stack.callback(os.environ.pop, CUBLAS, None)
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        # Without the cache, gradients of a weight that is used twice are added in float32.
        torch.set_autocast_cache_enabled(False)
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep Lightning's advice, and one warning of torch, off the screen."""
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"lightning\.")
        # Of the FRM's pooling: its windows do not overlap, so that nothing is added in any order.
        warnings.filterwarnings("ignore", message="max_pool2d_with_indices_backward_cuda")
        for name in ("lightning.fabric", "lightning.pytorch"):  # Fabric logs under both names
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.WARNING)
        yield


@contextmanager
def explain_out_of_memory(settings: TrainSettings, world_size: int) -> Iterator[None]:
    """Raise an AlmrrError that names the batch size where a device's memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(
            sign in str(error).lower() for sign in OUT_OF_MEMORY
        ):
            raise
        size = settings.batch_size
        each = f" ({size // world_size} on each of {world_size} devices)" if world_size > 1 else ""
        cheaper = ", set train.precision to bf16-mixed" * ("mixed" not in settings.precision)
        raise AlmrrError(
            f"Memory ran out in training with train.batch_size {size}{each}: halve the batch "
            f"size{cheaper}, or choose smaller widths in the model section. "
            f"The device reports: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def explain_compile_errors() -> Iterator[None]:
    """Raise an AlmrrError that names the setting where torch.compile fails."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    try:
        yield
    except TorchDynamoException as error:
        raise AlmrrError(
            "torch.compile could not compile the model; set train.compile to false, or install a "
            f"C++ compiler if that is missing. It reports: {' '.join(str(error).split()[:40])}"
        ) from error
