"""What a training says about itself: its history, its progress, live curves."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from almrr_pipeline.training.guards import check_finite
from almrr_pipeline.training.module import LOGGED, TrainingModule

logger = logging.getLogger(__name__)

OnMetrics = Callable[[int, Mapping[str, float]], None]
"""Called with the step and the values of a row, by the main process."""

COLUMNS = ("step", "loss", "reconstruction", "refinement", "learning_rate")
SECONDS_BETWEEN_LINES = 15.0


class HistoryRecorder(Callback):
    """Keeps the means of the losses over windows of steps, and stops the training when one is not finite.

    On a CPU every step is looked at. On a GPU values are read once a window (and before each checkpoint), so that the
    host need not wait for each step; the report still names the very step.

    Args:
        every: steps in a window.
        settings: parameters to name when a loss is not finite.
        gradient_may_overflow: float16 scaling skips steps whose gradient overflowed; that is no fault.
        on_metrics: gets each row as it is made, and once more those that a checkpoint brought back.
    """

    def __init__(
        self,
        *,
        every: int,
        settings: Mapping[str, object],
        gradient_may_overflow: bool,
        on_metrics: OnMetrics | None,
    ) -> None:
        self.rows: list[dict[str, float]] = []
        self._every = every
        self._settings = settings
        self._checked = LOGGED[:-1] if gradient_may_overflow else LOGGED
        self._on_metrics = on_metrics
        self._window: list[Tensor] = []  # each (4,) on the training's device
        self._extra: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """Put a value that is measured now and then into the next row: the largest, if there are several."""
        self._extra[name] = max(value, self._extra.get(name, value))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report again what a checkpoint brought back, so that a new log of curves is whole."""
        for row in self.rows:
            self._report(trainer, row)

    def on_train_batch_end(self, trainer: Trainer, pl_module: TrainingModule, *_: object) -> None:  # type: ignore[override]
        """Look at the step, and close the window if it is full."""
        self._window.append(pl_module.observed)
        step = trainer.global_step
        full = step % self._every == 0 or step == trainer.max_steps
        if full or pl_module.device.type == "cpu":
            self._check(step)
        if full:
            self._close_window(trainer, step, pl_module.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        """Rows and the open window, as plain numbers; checked, so that no checkpoint holds spoilt weights."""
        return {"rows": self.rows, "window": [values.tolist() for values in self._window], "extra": self._extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint held."""
        self.rows = state_dict["rows"]
        self._window = [torch.tensor(values) for values in state_dict["window"]]
        self._extra = state_dict["extra"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that came out of a step that was not finite."""
        self._check(trainer.global_step)

    def frame(self) -> pd.DataFrame:
        """The history: one row a window, with the means over its steps; no times."""
        names = [*COLUMNS, *sorted({name for row in self.rows for name in row} - set(COLUMNS))]
        frame = pd.DataFrame(self.rows, columns=names)
        return frame.astype({name: "int64" if name == "step" else "float64" for name in names})

    def _check(self, step: int) -> None:
        first = step - len(self._window) + 1
        for offset, values in enumerate(_to_host(self._window)):
            named = dict(zip(LOGGED, values, strict=True))
            check_finite({name: named[name] for name in self._checked}, step=first + offset, settings=self._settings)

    def _close_window(self, trainer: Trainer, step: int, learning_rate: float) -> None:
        means = torch.tensor(_to_host(self._window), dtype=torch.float64).mean(0)
        if trainer.world_size > 1:
            means = trainer.strategy.reduce(means.float().to(trainer.strategy.root_device), reduce_op="mean").cpu()
        losses = dict(zip(LOGGED, means.tolist(), strict=True))
        row = {name: losses[name] for name in COLUMNS if name in losses}
        self.rows.append({"step": step, **row, "learning_rate": learning_rate, **self._extra})
        self._window, self._extra = [], {}
        self._report(trainer, self.rows[-1])

    def _report(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        if self._on_metrics is not None and trainer.is_global_zero:
            self._on_metrics(int(row["step"]), {name: value for name, value in row.items() if name != "step"})


def _to_host(window: list[Tensor]) -> list[list[float]]:
    return torch.stack([values.cpu() for values in window]).tolist() if window else []


class ProgressReport(Callback):
    """A bar with loss and time left on a terminal; plain log lines, at most four a minute, elsewhere."""

    def __init__(self, history: HistoryRecorder) -> None:
        self._history = history
        self._bar: tqdm[Any] | None = None
        self._begun = (0.0, 0)
        self._last_line = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step the training starts from."""
        if not trainer.is_global_zero:
            return
        step, steps = trainer.global_step, trainer.max_steps
        self._begun, self._last_line = (time.monotonic(), step), time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=step, desc="training", unit="step", dynamic_ncols=True)
        logger.info("Training on %s from step %d to %d.", pl_module.device, step, steps)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Move on by one step."""
        if self._bar is not None:
            self._bar.update()
            if self._history.rows:
                self._bar.set_postfix(loss=f"{self._history.rows[-1]['loss']:.4f}", refresh=False)
        elif trainer.is_global_zero and self._history.rows:
            self._log(trainer.global_step, trainer.max_steps)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _log(self, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and step < steps:
            return
        self._last_line = now
        begun, first = self._begun
        left = (now - begun) / max(1, step - first) * (steps - step)
        row = self._history.rows[-1]
        logger.info(
            "Step %d of %d: loss %.4f (reconstruction %.4f, refinement %.4f), %s left.",
            step,
            steps,
            row["loss"],
            row["reconstruction"],
            row["refinement"],
            tqdm.format_interval(left),
        )
