"""Training ALMRR on a synthetic set."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.training import checkpoints
from almrr_pipeline.training.guards import explained_compilation, explained_memory
from almrr_pipeline.training.callbacks import HistoryRecorder, OnMetrics, ProgressReport
from almrr_pipeline.training.data import TrainingSet, build_loader, check_synthetic_set, sample_normals
from almrr_pipeline.training.module import OptimizerSettings, Loss, TrainingModule
from almrr_pipeline.training.randomness import algorithms, isolated_randomness
from almrr_pipeline.training.optim import Schedule
from almrr_pipeline.training.selection import ValidationSelection

logger = logging.getLogger(__name__)

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

STANDARDIZATION_IMAGES = 256
"""Normal images that mean and std of the features are taken over, at most."""

DEEPEST_STRIDE = 128
"""Of the FRM's innermost map over the image: features at 4, then five halvings."""


def fit(
    model: ALMRR,
    synthetic_set: TrainingSet,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    scratch: Path,
    fingerprint: str,
    seed: int,
    weight_decay: float = 0.0,
    optimizer: Literal["adam", "adamw"] = "adam",
    schedule: Schedule = "constant",
    focal_gamma: float = 2.0,
    reconstruction_weight: float = 1.0,
    refinement_weight: float = 1.0,
    gradient_clip: float = 1.0,
    precision: Precision = "32-true",
    flips: bool = True,
    rot90: bool = True,
    accelerator: str = "auto",
    devices: int | Literal["auto"] = "auto",
    nodes: int = 1,
    workers: int = 0,
    checkpoint_every: int = 200,
    log_every: int = 10,
    selection: Literal["last", "validation"] = "last",
    deterministic: bool = True,
    compile: bool = False,
    channels_last: bool = False,
    on_metrics: OnMetrics | None = None,
    keep_checkpoints: bool = False,
) -> pd.DataFrame:
    """Train a model in place; it ends in evaluation mode on the CPU.

    With several devices every process runs the caller's code up to here, and the main one alone goes on afterwards.
    The result depends on the model, the synthetic set and the arguments alone. On a CPU a training that was killed and run
    again ends with weights and history equal to the bit to an uninterrupted one, for the same machine, versions and
    number of threads. The caller's random state and torch's global settings are left as they were.

    Args:
        model: with initial weights; MFRM and FRM are trained, the backbone is not.
        synthetic set: simulated anomalies; images of the model's image size. There is no way to hand in test images.
        steps: optimizer steps.
        batch_size: samples a step, shared by all devices; may exceed the number of samples.
        learning_rate: the largest of the schedule.
        scratch: folder for checkpoints of trainings under way; no output of DVC, and shared by all nodes.
        fingerprint: of data and code (see `checkpoints.fingerprint`); together with the arguments that decide the
            result it says which checkpoint may be resumed.
        seed: of sample order, turns and drop path.
        weight_decay: of matrices and kernels; L2 with `adam`, decoupled with `adamw`. See `OptimizerSettings` for what is spared.
        optimizer: `adam` (the paper's) or `adamw`.
        schedule: `constant` (the paper's), `cosine` with a linear warm-up, or `one_cycle`.
        focal_gamma: of the focal loss; the paper's is 2.
        reconstruction_weight: of the mean squared error; the paper's is 1.
        refinement_weight: of the focal loss; the paper's is 1.
        gradient_clip: largest norm of the gradient; 0 for none.
        precision: Lightning's name; the bf16 and 16 kinds are autocast.
        flips: mirror samples at random; image, augmented image and mask alike.
        quarter_turns: turn samples by quarters at random, where they are square.
        accelerator: Lightning's name: auto, cpu, gpu ...
        devices: per node.
        nodes: machines; start with torchrun or under SLURM where there are several.
        workers: processes that read ahead where the synthetic set is not kept on a GPU; 0 chooses (four a GPU, none on a CPU).
        checkpoint_every: steps between checkpoints.
        log_every: steps that a row of the history is the mean of.
        selection: `last`: the last step's weights; `validation`: those with the best pixel average precision on the
            synthetic set's held-out part, looked at 20 times; adds the column `validation_ap`.
        deterministic: take deterministic algorithms. On a CPU all are. On a GPU an operation that has none warns and
            runs (torch's list: `torch.use_deterministic_algorithms`), and convolutions may be slower.
        compile: run the model through torch.compile.
        channels_last: memory format of images and convolutions.
        on_metrics: called by the main process with the step and the values of each row as it is made; after
            resuming, first once more with the rows made before.
        keep_checkpoints: leave the checkpoint after the last step for the caller to remove once the weights are safe;
            otherwise the training's folder is removed.

    Returns:
        The history: step, loss, reconstruction, refinement (before weighting), learning_rate; a row every `log_every`
        steps.

    Raises:
        AlmrrError: the synthetic set does not fit, a loss or gradient is not finite, memory runs out, the devices asked for do
            not exist, or this process has shared a training between devices before; says what to do.
        SystemExit: in all processes but the main one, with status 0 when the training is done: whatever the caller does
            with the model is done once. In the main process, with status 143, after SIGTERM.
    """
    check_synthetic_set(synthetic_set, image_size=model.image_size)
    objective = Loss(focal_gamma, reconstruction_weight, refinement_weight)
    descent = OptimizerSettings(
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        steps=steps,
        gradient_clip=gradient_clip,
        fused=precision != "16-mixed",  # a gradient scaler and the fused kernel would both unscale
    )
    decides = {
        "fingerprint": fingerprint,
        "model": model.hyperparameters,
        "samples": len(synthetic_set.augmented),
        "objective": vars(objective),
        "descent": vars(descent),
        "batch_size": batch_size,
        "precision": precision,
        "flips": flips,
        "rot90": rot90,
        "log_every": log_every,
        "selection": selection,
        "deterministic": deterministic,
        "compile": compile,
        "channels_last": channels_last,
        "seed": seed,
    }
    folder = checkpoints.CheckpointFolder(scratch, checkpoints.fingerprint(decides))
    history = HistoryRecorder(
        every=log_every,
        settings={"learning_rate": learning_rate, "gradient_clip": gradient_clip, "precision": precision},
        gradient_may_overflow=precision == "16-mixed",
        on_metrics=on_metrics,
    )
    best = None
    if selection == "validation":
        best = ValidationSelection(synthetic_set, batch_size=batch_size, steps=steps, history=history)
    saver = checkpoints.PeriodicCheckpoint(folder, every=checkpoint_every, after_last=keep_checkpoints)
    module = TrainingModule(
        model,
        objective=objective,
        descent=descent,
        loader=partial(
            build_loader,
            synthetic_set=synthetic_set,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            flips=flips,
            rot90=rot90,
            workers=workers,
        ),
        prepare=partial(_standardize, synthetic_set=synthetic_set),
        seed=seed,
        channels_last=channels_last,
        compile=compile,
    )
    with (
        _lightning_in_house(),
        isolated_randomness(),
        algorithms(deterministic=deterministic),
        _trainable(model, channels_last=channels_last),
    ):
        trainer = _build_trainer(
            callbacks=[one for one in (best, history, ProgressReport(history), saver) if one is not None],
            accelerator=accelerator,
            devices=devices,
            num_nodes=nodes,
            precision=precision,
            max_steps=steps,
            default_root_dir=scratch,
        )
        _check_alone(processes=trainer.world_size)
        _check_share(batch_size, processes=trainer.world_size, image_size=model.image_size)
        memory = explained_memory(batch_size=batch_size, devices=trainer.world_size, precision=precision)
        with memory, explained_compilation() if compile else nullcontext():
            trainer.fit(module, ckpt_path=_find_start(folder))
        if best is not None:
            best.restore_best(module)
    if not trainer.is_global_zero:
        raise SystemExit(0)
    if not keep_checkpoints:
        folder.remove()
    return history.frame()


def _standardize(model: ALMRR, *, synthetic_set: TrainingSet) -> None:
    """Take mean and std of the features over an even choice of the synthetic set's normal images, if the model asks."""
    if model.standardize:
        device = model.feature_mean.device
        model.fit_standardization(images.to(device) for images in sample_normals(synthetic_set, STANDARDIZATION_IMAGES))


def _find_start(folder: checkpoints.CheckpointFolder) -> Path | None:
    start = folder.newest()
    if start is not None:
        logger.info("Going on from the checkpoint %s.", start)
    return start


def _check_alone(*, processes: int) -> None:
    """Refuse a second shared training in one process: the first one's process group outlives it."""
    if processes > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
        raise AlmrrError(
            f"This process has shared a training between devices before and cannot share another one by {processes} "
            "devices: train one category per process, with `kedro run --pipelines train --namespaces CATEGORY` or "
            "`dvc repro train`, or set train.devices to 1."
        )


def _check_share(batch_size: int, *, processes: int, image_size: tuple[int, int]) -> None:
    """Refuse a batch size that the processes cannot share, or whose shares cannot be normalized."""
    if batch_size % processes:
        raise AlmrrError(
            f"train.batch_size {batch_size} cannot be shared equally by {processes} devices; "
            f"take {max(1, round(batch_size / processes)) * processes}."
        )
    rows, columns = (side // DEEPEST_STRIDE for side in image_size)
    if batch_size // processes * rows * columns < 2:
        raise AlmrrError(
            f"train.batch_size {batch_size} leaves {processes} devices one sample each, which the FRM's batch "
            f"normalization cannot work with at {image_size[0]}x{image_size[1]}; take {2 * processes}."
        )


def _build_trainer(*, callbacks: list[Callback], default_root_dir: Path, **settings: Any) -> Trainer:  # noqa: ANN401
    """A Trainer that writes no files and no logs of its own.

    Raises:
        AlmrrError: the devices asked for do not exist.
    """
    plugins: list[Any] = [checkpoints.AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning's own requeueing saves wherever a step stands when the signal comes; ours saves between steps.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        return Trainer(
            **settings,
            strategy="auto",
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=default_root_dir,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
        asked = ", ".join(f"{name} {settings[name]}" for name in ("accelerator", "devices", "num_nodes", "precision"))
        raise AlmrrError(f"Cannot train with {asked}: {error} Change them in the train section.") from error


@contextmanager
def _trainable(model: ALMRR, *, channels_last: bool) -> Iterator[None]:
    """Training mode inside; evaluation mode on the CPU, in the ordinary memory format, afterwards."""
    model.train()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.eval().cpu().to(memory_format=torch.contiguous_format)


@contextmanager
def _lightning_in_house() -> Iterator[None]:
    """Keep Lightning's advice from the screen, and give Ctrl-C and SIGTERM back their meaning."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [one.level for one in loggers]
    in_main = threading.current_thread() is threading.main_thread()
    interrupt = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", module=r"lightning\.")
            for one in loggers:
                one.setLevel(logging.WARNING)
            yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(stop, SIGTERMException):  # as such it would end the process with 0, as if all were well
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        if interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)
