"""History and validation: what the training loop reports and measures."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from lightning.fabric import Fabric
from sklearn.metrics import average_precision_score
from torch import Tensor

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.progress import track
from almrr_pipeline.common.region import find_counted
from almrr_pipeline.config import TrainSettings
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.synthesis.synthetic_set import SyntheticSet
from almrr_pipeline.training.data import to_images

logger = logging.getLogger(__name__)

OnMetrics = Callable[[int, Mapping[str, float]], None]
"""Called by the main process with the step and the values of a row."""

LOGGED = ("loss", "reconstruction", "refinement", "gradient_norm")
"""Values recorded of each step."""
COLUMNS = ("step", "loss", "reconstruction", "refinement", "learning_rate")
"""Of the history; validation adds `METRIC`."""
METRIC = "validation_ap"
VALIDATIONS = 20
"""How often a training is validated, evenly spread, the last step included."""


class History:
    """Means of the losses over windows of `log_every` steps; stops a training that diverges.

    On a CPU every step is checked. On a GPU values are read once a window and before each
    checkpoint, so that the host need not wait for each step; the error still names the step.
    """

    def __init__(
        self, settings: TrainSettings, fabric: Fabric, on_metrics: OnMetrics | None
    ) -> None:
        self.rows: list[dict[str, float]] = []
        self._settings = settings
        self._fabric = fabric
        self._on_metrics = on_metrics
        self._window: list[Tensor] = []  # (4,) each, on the training's device
        self._extra: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1) if fabric.device.type != "cpu" else None
        self._reports: deque[Future[None]] = deque()  # calls of on_metrics in that thread

    def add(self, name: str, value: float) -> None:
        """Put a value that is measured now and then into the next row: of several, the largest."""
        self._extra[name] = max(value, self._extra.get(name, value))

    def record(self, step: int, observed: Tensor, learning_rate: float) -> None:
        """Take the `LOGGED` values (4,) of a step, counted from 1; closes the window if it is full.

        Raises:
            AlmrrError: a loss or the gradient is not finite.
        """
        self._window.append(observed)
        full = step % self._settings.log_every == 0 or step == self._settings.steps
        if full or observed.device.type == "cpu":
            self.check(step)
        if full:
            self._close_window(step, learning_rate)

    def check(self, step: int) -> None:
        """Stop if a value of the open window, which ends with `step`, is not finite."""
        first = step - len(self._window) + 1
        for offset, values in enumerate(_to_host(self._window)):
            named = dict(zip(LOGGED, values, strict=True))
            if self._settings.precision == "16-mixed":
                del named["gradient_norm"]  # float16's scaler skips steps whose gradient overflowed
            check_finite(named, step=first + offset, settings=self._settings)

    def report_again(self) -> None:
        """Report the rows that a checkpoint restored, so that a new log of curves is complete."""
        for row in self.rows:
            self._report(row)

    @contextmanager
    def show_progress(self, *, done: int) -> Iterator[Callable[[], None]]:
        """Show the progress in the main process; the yielded function counts a step."""
        if not self._fabric.is_global_zero:
            yield lambda: None
            return
        steps = self._settings.steps
        logger.info("Training on %s from step %d to %d.", self._fabric.device, done, steps)
        with track(steps, unit="steps", description="training", done=done) as advance:
            try:
                yield lambda: advance(1, **self._shown())
            except BaseException:  # a slow server must not delay the end
                self._finish_reports(drop_pending=True)
                raise
        self._finish_reports(drop_pending=False)
        self._raise_from_reports()
        line = "Trained %d steps: loss %.4f (reconstruction %.4f, refinement %.4f)."
        logger.info(line, *(self.rows[-1][name] for name in COLUMNS[:4]))

    def frame(self) -> pd.DataFrame:
        """The history, a row per window."""
        extra = {name for row in self.rows for name in row} - set(COLUMNS)
        frame = pd.DataFrame(self.rows, columns=[*COLUMNS, *sorted(extra)])
        return frame.astype({name: "int64" if name == "step" else "float64" for name in frame})

    def state_dict(self) -> dict[str, Any]:
        """Rows and the open window, as plain numbers."""
        return {"rows": self.rows, "window": _to_host(self._window), "extra": self._extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore rows and open window."""
        self.rows = state_dict["rows"]
        device = self._fabric.device
        self._window = [torch.tensor(values, device=device) for values in state_dict["window"]]
        self._extra = state_dict["extra"]

    def _finish_reports(self, *, drop_pending: bool) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=drop_pending)

    def _shown(self) -> dict[str, str]:
        return {"loss": f"{self.rows[-1]['loss']:.4f}"} if self.rows else {}

    def _close_window(self, step: int, learning_rate: float) -> None:
        means = torch.tensor(_to_host(self._window), dtype=torch.float64).mean(0)
        if self._fabric.world_size > 1:
            reduced = self._fabric.all_reduce(means.float(), reduce_op="mean")
            means = cast(Tensor, reduced).cpu()
        losses = dict(zip(LOGGED, means.tolist(), strict=True))
        row = {name: losses[name] for name in COLUMNS if name in losses}
        self.rows.append({"step": step, **row, "learning_rate": learning_rate, **self._extra})
        self._window, self._extra = [], {}
        self._report(self.rows[-1])

    def _report(self, row: Mapping[str, float]) -> None:
        if self._on_metrics is not None and self._fabric.is_global_zero:
            values = {name: value for name, value in row.items() if name != "step"}
            if self._thread is None:
                self._on_metrics(int(row["step"]), values)
            else:
                self._raise_from_reports()
                self._reports.append(
                    self._thread.submit(self._on_metrics, int(row["step"]), values)
                )

    def _raise_from_reports(self) -> None:
        """Raise what on_metrics raised in a call that has ended."""
        while self._reports and self._reports[0].done():
            self._reports.popleft().result()


def _to_host(window: list[Tensor]) -> list[list[float]]:
    return torch.stack(window).tolist() if window else []


def check_finite(values: Mapping[str, float], *, step: int, settings: TrainSettings) -> None:
    """Stop if a loss or the gradient's norm is not finite.

    Raises:
        AlmrrError: names the step (counted from 1), all values and the parameters worth changing.
    """
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if not wrong:
        return
    parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
    names = ("learning_rate", "gradient_clip", "precision")
    now = ", ".join(f"{name} {getattr(settings, name)}" for name in names)
    raise AlmrrError(
        f"Training stopped at step {step}: {' and '.join(wrong)} not finite ({parts}). Lower "
        "train.learning_rate, set train.gradient_clip to 1 or less, or train with train.precision "
        f"32-true (now: {now}). The last good checkpoint is kept; with the same parameters a new "
        "run would resume from it and stop again, with others it starts afresh."
    )


class ValidationSelection:
    """Keeps the weights with the best pixel average precision, where `selection` is validation.

    It is measured on validation images with simulated anomalies; no test image takes part. Only the
    main process validates; with several processes the others wait, and end with the last weights.

    Raises:
        AlmrrError: the synthetic set has no anomalous pixel for validation.
    """

    def __init__(
        self, synthetic_set: SyntheticSet, settings: TrainSettings, fabric: Fabric, history: History
    ) -> None:
        self._enabled = settings.selection == "validation"
        if self._enabled and not np.any(synthetic_set.validation_masks):
            raise AlmrrError(
                "train.selection is validation, but the synthetic set has no simulated anomalies "
                "on validation images: set data.validation_fraction above 0 and run the synthesize "
                "stage again, or take train.selection: last."
            )
        self._synthetic_set = synthetic_set
        self._settings = settings
        self._fabric = fabric
        self._history = history
        self._best: dict[str, Any] = {"value": -1.0, "step": 0, "weights": {}}

    def validate(self, step: int, model: ALMRR) -> None:
        """Validate, if it is due after `step` steps, and keep the weights if they are the best."""
        every = max(1, math.ceil(self._settings.steps / VALIDATIONS))
        if not self._enabled or (step % every and step != self._settings.steps):
            return
        if self._fabric.is_global_zero:
            value = self._measure(model)
            self._history.add(METRIC, value)
            if value > self._best["value"]:
                state = model.state_dict().items()
                weights = {name: tensor.detach().cpu().clone() for name, tensor in state}
                self._best = {"value": value, "step": step, "weights": weights}
        self._fabric.barrier("validation")

    def restore_best(self, model: ALMRR) -> None:
        """Load the best weights into the model."""
        if self._best["weights"]:
            model.load_state_dict(self._best["weights"])
            line = "Selected the weights of step %d: validation pixel AP %.4f."
            logger.info(line, self._best["step"], self._best["value"])

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return self._best

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best so far."""
        self._best = state_dict

    @torch.no_grad()
    def _measure(self, model: ALMRR) -> float:
        """Pixel average precision on the validation images."""
        scores = []
        augmented, size = self._synthetic_set.validation_augmented, self._settings.batch_size
        model.eval()
        try:
            for start in range(0, len(augmented), size):
                images = torch.from_numpy(np.array(augmented[start : start + size]))
                images = images.to(self._fabric.device)
                with self._fabric.autocast():
                    maps = model(to_images(images, channels_last=False))
                scores.append(maps.float().cpu().numpy().ravel())
        finally:
            model.train()
        labels, values = self._synthetic_set.validation_masks.ravel(), np.concatenate(scores)
        if self._synthetic_set.has_region:
            counted = find_counted(np.asarray(self._synthetic_set.validation_normals))
            chosen = counted[self._synthetic_set.validation_normal_index].ravel()
            labels, values = labels[chosen], values[chosen]
        return float(average_precision_score(labels, values))
