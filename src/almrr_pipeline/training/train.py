"""Training ALMRR on a synthetic set."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from almrr_pipeline.config import TrainSettings
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.fused_backbone import FusedBackbone
from almrr_pipeline.model.inputs import find_counted
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training import checkpoints
from almrr_pipeline.training.callbacks import History, OnMetrics, ValidationSelection
from almrr_pipeline.training.checkpoints import CheckpointFolder, Resuming
from almrr_pipeline.training.data import (
    Batch,
    build_loader,
    check_synthetic_set,
    derive_seed,
    draw_normals,
    number_owners,
    sample_normals,
    to_images,
)
from almrr_pipeline.training.features import FeatureCache
from almrr_pipeline.training.losses import compute_losses
from almrr_pipeline.training.optim import build_optimizer, clip_gradient, set_learning_rate
from almrr_pipeline.training.runtime import (
    decide_to_stop,
    prefers_channels_last,
    training_environment,
)

FrozenBackbone = Callable[[Tensor, Tensor], list[Tensor]]
"""From images (B, 3, H, W) and their keys (B,) to the backbone's maps."""
NOT_DECISIVE = {"accelerator", "checkpoint_every", "devices", "nodes", "workers"}
"""Settings that may change between an interruption and the next run."""
STANDARDIZATION_IMAGES = 256
"""Normal images, at most, over which mean and std of the features are taken."""
MEMORY_IMAGES = 512
"""Normal images, at most, whose features may be remembered."""


class TrainingInterrupted(Exception):  # noqa: N818 - not an error: the process was asked to end
    """SIGTERM ended the training after a checkpoint; the process should exit with status 143."""


def fit(
    model: ALMRR,
    synthetic_set: SyntheticSet,
    settings: TrainSettings,
    *,
    resuming: Resuming,
    seed: int,
    specimens: Mapping[str, str] | None = None,
    on_metrics: OnMetrics | None = None,
) -> pd.DataFrame | None:
    """Train a model in place; it ends in evaluation mode on the CPU.

    The result depends on the model, the synthetic set, the settings and the seed alone. On a CPU a
    training that was killed and run again ends with weights and history bit-identical to an
    uninterrupted one, for the same machine, versions and number of threads. The caller's random
    state and torch's global settings are left as they were.

    Args:
        model: with initial weights; MFRM and FRM are trained, the backbone is not.
        synthetic_set: simulated anomalies at the model's image size. No test image can take part.
        settings: the `train` section; where `steps_per_image` is set, the steps follow the number
            of the set's normal images.
        resuming: where checkpoints are, and which of them are this training's.
        seed: of sample order, augmentation, drop path and what is remembered.
        specimens: which specimen a training image shows, by the images' names in the set's
            description, where several show one.
        on_metrics: called by the main process with the step and the values of each row as it is
            made; after resuming, first with the rows made before. On a GPU from another thread, in
            order, so that a slow one does not let the GPU wait; what it raises ends the training.

    Returns:
        The history, a row for every `log_every` steps: step, loss, reconstruction and refinement
        (before weighting), learning_rate, and validation_ap where `selection` is validation. None
        in all processes of a distributed training but the main one: they are done.

    Raises:
        AlmrrError: the synthetic set or the devices do not suit, a loss or gradient is not finite,
            memory runs out, or this process has taken part in a distributed training before.
        TrainingInterrupted: after SIGTERM, in all processes.
    """
    check_synthetic_set(synthetic_set, image_size=model.image_size)
    settings = settings.for_images(len(synthetic_set.normals))
    key = _describe(model, synthetic_set, settings, resuming.fingerprint, seed)
    folder = CheckpointFolder(resuming.scratch, key)
    owners = number_owners(synthetic_set, specimens or {})
    with training_environment(model, settings) as (fabric, stop), folder:
        history = History(settings, fabric, on_metrics)
        selection = ValidationSelection(synthetic_set, settings, fabric, history)
        optimizer = build_optimizer(model, settings)
        backbone = _freeze_backbone(model, synthetic_set, settings, resuming, fabric)
        training_step = TrainingStep(
            model, settings, backbone, owners.to(fabric.device), has_region=synthetic_set.has_region
        )
        forward, optimizer = fabric.setup(training_step, optimizer)
        parts = {"model": model, "optimizer": optimizer, "scaler": fabric.strategy.precision}
        parts |= {"history": history, "selection": selection}
        newest = fabric.broadcast(folder.newest() if fabric.is_global_zero else None)
        first = folder.restore(newest, parts) if newest else 0
        if first == 0:
            _show_normals(model, synthetic_set, settings, owners, fabric, seed=seed)
        history.report_again()
        loader = build_loader(synthetic_set, settings, fabric, seed=seed, first=first)
        with history.show_progress(done=first) as advance:
            for done, batch in enumerate(loader, start=first):
                # Drop path depends on seed, step and process alone, so that resuming repeats it.
                torch.manual_seed(derive_seed(seed, "step", done, fabric.global_rank))
                rate = set_learning_rate(optimizer, settings, done)
                losses = forward(fabric.to_device(batch))  # the loss and its two terms
                optimizer.zero_grad()
                fabric.backward(losses[0])
                norm = clip_gradient(fabric, model, optimizer, settings.gradient_clip)
                optimizer.step()

                step = done + 1  # counted from 1 from here on
                selection.validate(step, model)
                history.record(step, torch.stack([*losses, norm]).detach(), rate)
                advance()
                stopping = decide_to_stop(fabric, stop, step)
                if stopping or step % settings.checkpoint_every == 0 or step == settings.steps:
                    history.check(step)
                    if fabric.is_global_zero:
                        folder.save(step, parts, background=fabric.device.type == "cuda")
                        if stopping or step == settings.steps:
                            folder.wait()
                    fabric.barrier("checkpoint")
                if stopping:
                    raise TrainingInterrupted(f"SIGTERM: stopped after step {step}.")
        selection.restore_best(model)
    if not fabric.is_global_zero:
        return None
    if not resuming.keep:
        folder.remove()
    return history.frame()


class TrainingStep(nn.Module):
    """The forward pass of a step; Fabric runs it in the training's precision, and by DDP."""

    def __init__(
        self,
        model: ALMRR,
        settings: TrainSettings,
        backbone: FrozenBackbone | None = None,
        owners: Tensor | None = None,
        *,
        has_region: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self._has_region = has_region
        self._owners = owners
        self._backbone = backbone
        self._settings = settings
        forward = model.training_forward
        self._forward = torch.compile(forward) if settings.compile else forward

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a batch and its two terms, see `compute_losses`."""
        channels_last = prefers_channels_last(self._settings, batch["mask"].device)
        normal = to_images(batch["normal"], channels_last=channels_last)
        augmented = to_images(batch["augmented"], channels_last=channels_last)
        embedded = None
        if (backbone := self._backbone) is not None:
            keys = batch["keys"].flatten()
            embedded = self.model.embed_both(
                normal, augmented, lambda images, chosen: backbone(images, keys[chosen])
            )
        owners = None
        if self.model.memory is not None and self._owners is not None:
            owners = self._owners[batch["sources"]]
        output = self._forward(normal, augmented, embedded, owners)
        counted = find_counted(normal) if self._has_region else None
        return compute_losses(output, batch["mask"], self._settings, counted)


def _freeze_backbone(
    model: ALMRR,
    synthetic_set: SyntheticSet,
    settings: TrainSettings,
    resuming: Resuming,
    fabric: Fabric,
) -> FrozenBackbone | None:
    """What embeds images in the backbone's place on a CPU: fused, and with a cache if one is set.

    None on a GPU, where the model embeds them itself.
    """
    if fabric.device.type != "cpu":
        return None
    fused = FusedBackbone(model.backbone, model.image_size).to(memory_format=torch.channels_last)
    if settings.feature_cache_gb <= 0:
        return lambda images, _keys: fused(images.contiguous(memory_format=torch.channels_last))
    limit = settings.feature_cache_gb * 1e9 / fabric.world_size
    preferred = 8 * len(synthetic_set.normals)  # each in eight flips and turns
    return FeatureCache(fused, resuming.scratch, limit=limit, preferred=preferred)


def _show_normals(
    model: ALMRR,
    synthetic_set: SyntheticSet,
    settings: TrainSettings,
    owners: Tensor,
    fabric: Fabric,
    *,
    seed: int,
) -> None:
    """Give the model what it takes from normal images before the first step."""
    if model.settings.standardize:
        normals = sample_normals(synthetic_set.normals, STANDARDIZATION_IMAGES)
        model.fit_standardization(images.to(fabric.device) for images in normals)
    if model.memory is None:
        return
    count = min(len(owners), MEMORY_IMAGES)
    drawn = draw_normals(synthetic_set, owners, settings, count=count, seed=seed)
    batches = (fabric.to_device(batch) for batch in drawn)
    has_region = synthetic_set.has_region
    model.fill_memory(batches, images=count, seed=seed, has_region=has_region)
    if model.memory.exponent:
        unseen = sample_normals(synthetic_set.validation_normals, MEMORY_IMAGES)
        on_device = (images.to(fabric.device) for images in unseen)
        model.fit_evidence(on_device, has_region=has_region)


def _describe(
    model: ALMRR, synthetic_set: SyntheticSet, settings: TrainSettings, fingerprint: str, seed: int
) -> str:
    """The fingerprint of all that decides a training's result."""
    decisive = {
        "fingerprint": fingerprint,
        "image_size": model.image_size,
        "model": model.settings.model_dump(),
        "samples": len(synthetic_set.augmented),
        "train": settings.model_dump(exclude=NOT_DECISIVE),
        "seed": seed,
    }
    return checkpoints.fingerprint(decisive)
