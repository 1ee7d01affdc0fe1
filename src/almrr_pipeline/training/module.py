"""One training step of ALMRR, as Lightning runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from almrr_pipeline.model.almrr import ALMRR, TrainingOutput
from almrr_pipeline.training.data import Batch, to_images
from almrr_pipeline.training.losses import focal_loss, reconstruction_loss
from almrr_pipeline.training.randomness import derive_seed
from almrr_pipeline.training.optim import Schedule, learning_rate_factors

NO_DECAY = ("A_log", "position")
"""Parameters that do not decay though they have more than one dimension: the scan's A and the position embedding."""

LOGGED = ("loss", "reconstruction", "refinement", "gradient_norm")
"""What a step is observed by."""


@dataclass(frozen=True)
class Loss:
    """The loss: reconstruction_weight * MSE(F_hat, phi) + refinement_weight * focal(map, M); the paper's is 1 : 1."""

    focal_gamma: float
    reconstruction_weight: float
    refinement_weight: float

    def __call__(self, output: TrainingOutput, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The whole loss and its two parts before weighting, each a float32 scalar."""
        reconstruction = reconstruction_loss(output.reconstruction, output.target)
        refinement = focal_loss(output.logits, mask, self.focal_gamma)
        loss = self.reconstruction_weight * reconstruction + self.refinement_weight * refinement
        return loss, reconstruction, refinement


@dataclass(frozen=True)
class OptimizerSettings:
    """How the weights move.

    Attributes:
        optimizer: `adam` (decay, if any, is added to the gradient) or `adamw` (decoupled decay).
        learning_rate: the largest.
        weight_decay: of matrices and kernels; biases, norms, the position embedding and the scan's A and D are spared,
            as is usual.
        schedule: see `learning_rate_factors`.
        steps: length of the training.
        gradient_clip: largest norm of the gradient; 0 for none.
        fused: one kernel for all parameters; not to be used with a gradient scaler.
    """

    optimizer: Literal["adam", "adamw"]
    learning_rate: float
    weight_decay: float
    schedule: Schedule
    steps: int
    gradient_clip: float
    fused: bool

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam or AdamW over the model's trained parameters, in two groups by whether they decay."""
        decaying: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_spared = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY
                (spared if is_spared else decaying).append(parameter)
        groups = [
            {"params": decaying, "weight_decay": self.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ]
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind([group for group in groups if group["params"]], lr=self.learning_rate, fused=self.fused)


class TrainingModule(LightningModule):
    """ALMRR with its loss and its optimizer.

    Args:
        model: changed in place.
        objective: the loss.
        descent: the optimizer and its schedule.
        loader: makes the loader of batches for a device, the rank and the number of processes.
        prepare: called once with the model on its device before a training that starts afresh.
        seed: of everything random in a step (drop path).
        channels_last: memory format of the images.
        compile: run the model through torch.compile.
    """

    def __init__(
        self,
        model: ALMRR,
        *,
        objective: Loss,
        descent: OptimizerSettings,
        loader: Callable[[torch.device, int, int], Any],
        prepare: Callable[[ALMRR], None],
        seed: int,
        channels_last: bool,
        compile: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.observed = torch.zeros(len(LOGGED))
        self.learning_rate = descent.learning_rate
        self._objective = objective
        self._descent = descent
        self._loader = loader
        self._prepare = prepare
        self._seed = seed
        self._channels_last = channels_last
        self._step = torch.compile(model.training_forward) if compile else model.training_forward

    def train_dataloader(self) -> Any:  # noqa: ANN401 - any loader that Lightning takes
        """The loader on this process's device."""
        return self._loader(self.device, self.global_rank, self.trainer.world_size)

    def on_fit_start(self) -> None:
        """Standardize the features, say, unless a checkpoint already did."""
        if self.trainer.ckpt_path is None:
            self._prepare(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the step, so that its drop path depends on nothing but the seed, the step and the process."""
        torch.manual_seed(derive_seed(self._seed, "step", self.global_step, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        normal = to_images(batch["normal"], channels_last=self._channels_last)
        augmented = to_images(batch["augmented"], channels_last=self._channels_last)
        losses = self._objective(self._step(normal, augmented), batch["mask"])
        self.observed = torch.stack(losses).detach()
        return losses[0]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: object, **__: object) -> None:
        """Clip the gradient; note its norm before clipping, and the learning rate of the step."""
        limit = self._descent.gradient_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.trainable_parameters(), limit)
        self.observed = torch.cat([self.observed, norm.detach().float().view(1)])
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and its learning rate by step."""
        optimizer = self._descent.build_optimizer(self.model)
        scheduler = LambdaLR(optimizer, learning_rate_factors(self._descent.schedule, self._descent.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
