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
from typing import Any

import pandas as pd
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import TrainSettings
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.training import checkpoints
from almrr_pipeline.training.guards import explained_compilation, explained_memory
from almrr_pipeline.training.callbacks import HistoryRecorder, OnMetrics, ProgressReport
from almrr_pipeline.training.data import TrainingSet, build_loader, check_synthetic_set, sample_normals
from almrr_pipeline.training.module import OptimizerSettings, Loss, TrainingModule
from almrr_pipeline.training.randomness import algorithms, isolated_randomness
from almrr_pipeline.training.selection import ValidationSelection

logger = logging.getLogger(__name__)

UNDECISIVE = {"accelerator", "checkpoint_every", "devices", "nodes", "workers"}
"""Settings that may change between an interruption and the next run: the result does not depend on them."""

STANDARDIZATION_IMAGES = 256
"""Normal images that mean and std of the features are taken over, at most."""

DEEPEST_STRIDE = 128
"""Of the FRM's innermost map over the image: features at 4, then five halvings."""


def fit(
    model: ALMRR,
    synthetic_set: TrainingSet,
    settings: TrainSettings,
    *,
    scratch: Path,
    fingerprint: str,
    seed: int,
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
        settings: the `train` section.
        scratch: folder for checkpoints of trainings under way; no output of DVC, and shared by all nodes.
        fingerprint: of data and code (see `checkpoints.fingerprint`); together with the settings that decide the
            result it selects the checkpoint to resume from.
        seed: of sample order, flips and drop path.
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
    objective = Loss(settings.focal_gamma, settings.reconstruction_weight, settings.refinement_weight)
    descent = OptimizerSettings(
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule=settings.schedule,
        steps=settings.steps,
        gradient_clip=settings.gradient_clip,
        fused=settings.precision != "16-mixed",  # a gradient scaler and the fused kernel would both unscale
    )
    decides = {
        "fingerprint": fingerprint,
        "model": {"image_size": model.image_size, **model.settings.model_dump(mode="json")},
        "samples": len(synthetic_set.augmented),
        "settings": settings.model_dump(exclude=UNDECISIVE),
        "seed": seed,
    }
    folder = checkpoints.CheckpointFolder(scratch, checkpoints.fingerprint(decides))
    history = HistoryRecorder(
        every=settings.log_every,
        settings=settings.model_dump(include={"learning_rate", "gradient_clip", "precision"}),
        gradient_may_overflow=settings.precision == "16-mixed",
        on_metrics=on_metrics,
    )
    best = None
    if settings.selection == "validation":
        best = ValidationSelection(
            synthetic_set, batch_size=settings.batch_size, steps=settings.steps, history=history
        )
    saver = checkpoints.PeriodicCheckpoint(folder, every=settings.checkpoint_every, after_last=keep_checkpoints)
    module = TrainingModule(
        model,
        objective=objective,
        descent=descent,
        loader=partial(
            build_loader,
            synthetic_set=synthetic_set,
            batch_size=settings.batch_size,
            steps=settings.steps,
            seed=seed,
            flips=settings.flips,
            rot90=settings.rot90,
            workers=settings.workers,
        ),
        prepare=partial(_standardize, synthetic_set=synthetic_set),
        seed=seed,
        channels_last=settings.channels_last,
        compile=settings.compile,
    )
    with (
        _lightning_in_house(),
        isolated_randomness(),
        algorithms(deterministic=settings.deterministic),
        _trainable(model, channels_last=settings.channels_last),
    ):
        trainer = _build_trainer(
            callbacks=[one for one in (best, history, ProgressReport(history), saver) if one is not None],
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
            precision=settings.precision,
            max_steps=settings.steps,
            default_root_dir=scratch,
        )
        _check_alone(processes=trainer.world_size)
        _check_share(settings.batch_size, processes=trainer.world_size, image_size=model.image_size)
        memory = explained_memory(
            batch_size=settings.batch_size, devices=trainer.world_size, precision=settings.precision
        )
        with memory, explained_compilation() if settings.compile else nullcontext():
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
    if model.settings.standardize:
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
