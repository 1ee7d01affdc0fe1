"""Choosing weights by simulated anomalies on validation images; no test image has a part in it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.training.callbacks import HistoryRecorder
from almrr_pipeline.training.data import TrainingSet, to_images
from almrr_pipeline.training.module import TrainingModule

logger = logging.getLogger(__name__)

LOOKS = 20
"""How often a training is looked at, evenly spread, the last step included."""
METRIC = "validation_ap"


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Area under the precision-recall curve as the sum over thresholds of (R_n - R_{n-1}) P_n, exact with ties.

    Args:
        scores: float, shape (n,); higher is more anomalous.
        labels: bool, shape (n,); at least one is true.

    Returns:
        A value in [0, 1], as scikit-learn's average_precision_score.
    """
    ordered, order = scores.sort(descending=True)
    hits = labels[order].double().cumsum(0)
    last_of_ties = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])
    hits, ranks = hits[last_of_ties], torch.arange(1, len(ordered) + 1, device=scores.device)[last_of_ties]
    gains = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((gains * hits / ranks).sum() / hits[-1])


class ValidationSelection(Callback):
    """Keeps the weights with the best pixel average precision on the synthetic set's held-out part.

    The main process alone evaluates and keeps; with several processes the others wait, and end with the last weights.

    Args:
        synthetic set: its held_augmented and held_masks are used.
        batch_size: images at a time.
        steps: length of the training.
        history: gets each value, as column `validation_ap`.

    Raises:
        AlmrrError: the held-out part has no anomalous pixel.
    """

    def __init__(self, synthetic_set: TrainingSet, *, batch_size: int, steps: int, history: HistoryRecorder) -> None:
        if not np.any(synthetic_set.validation_masks):
            raise AlmrrError(
                "train.selection is held_out, but the synthetic set has no simulated anomalies on validation images: set "
                "data.calibration above 0 and run the synthesize stage again, or take train.selection: last."
            )
        self._synthetic_set = synthetic_set
        self._batch_size = batch_size
        self._every = max(1, -(-steps // LOOKS))
        self._history = history
        self._best = -1.0
        self._best_step = 0
        self._weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: TrainingModule, *_: object) -> None:  # type: ignore[override]
        """Look, if the step's turn has come, and keep the weights if they are the best so far."""
        step = trainer.global_step
        if step % self._every and step != trainer.max_steps:
            return
        if trainer.is_global_zero:
            self._look(trainer, pl_module, step)
        trainer.strategy.barrier("validation")

    def restore_best(self, module: TrainingModule) -> None:
        """Put the best weights into the model."""
        if self._weights:
            module.model.load_state_dict(self._weights)
            logger.info("Took the weights of step %d: held-out pixel AP %.4f.", self._best_step, self._best)

    def state_dict(self) -> dict[str, Any]:
        """The best so far, for a checkpoint."""
        return {"best": self._best, "best_step": self._best_step, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint held."""
        self._best, self._best_step = state_dict["best"], state_dict["best_step"]
        self._weights = state_dict["weights"]

    def _look(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        module.model.eval()
        try:
            value = self._evaluate(trainer, module)
        finally:
            module.model.train()
        self._history.add(METRIC, value)
        if value > self._best:
            self._best, self._best_step = value, step
            self._weights = {name: one.detach().cpu().clone() for name, one in module.model.state_dict().items()}

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, module: TrainingModule) -> float:
        scores = []
        for start in range(0, len(self._synthetic_set.validation_augmented), self._batch_size):
            images = np.ascontiguousarray(self._synthetic_set.validation_augmented[start : start + self._batch_size])
            images = to_images(torch.from_numpy(images).to(module.device), channels_last=False)
            with trainer.precision_plugin.forward_context():
                scores.append(module.model(images).float().cpu().flatten())
        labels = torch.from_numpy(np.array(self._synthetic_set.validation_masks)).bool().flatten()
        return average_precision(torch.cat(scores), labels)
