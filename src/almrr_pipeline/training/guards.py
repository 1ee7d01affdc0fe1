"""What stops a training that has gone wrong, with a sentence that helps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from almrr_pipeline.common.errors import AlmrrError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def check_finite(values: Mapping[str, float], *, step: int, settings: Mapping[str, object]) -> None:
    """Stop if a loss part or the gradient's norm is not a finite number.

    Args:
        values: the step's loss parts and gradient norm, by name.
        step: counted from 1.
        settings: the parameters worth changing, with their present values.

    Raises:
        AlmrrError: names the step, all values and what to try.
    """
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if not wrong:
        return
    parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
    now = ", ".join(f"{name} {value}" for name, value in settings.items())
    raise AlmrrError(
        f"Training stopped at step {step}: {' and '.join(wrong)} not finite ({parts}). Lower train.learning_rate, "
        f"set train.gradient_clip to 1 or less, or train with train.precision 32-true (now: {now}). "
        "The last good checkpoint is kept; the same parameters would go on from it to the same end, changed ones "
        "start afresh."
    )


@contextmanager
def explained_memory(*, batch_size: int, devices: int, precision: str) -> Iterator[None]:
    """Turn a device's "out of memory" into a sentence that names the batch size.

    Args:
        batch_size: samples a step, over all devices.
        devices: how many share it.
        precision: the present one.

    Raises:
        AlmrrError: memory ran out inside the context.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(
            sign in str(error).lower() for sign in _OUT_OF_MEMORY
        ):
            raise
        share = f" ({batch_size // devices} on each of {devices} devices)" if devices > 1 else ""
        cheaper = "" if precision != "32-true" else ", set train.precision to bf16-mixed"
        raise AlmrrError(
            f"Memory ran out in training with train.batch_size {batch_size}{share}: halve the batch size{cheaper}, or "
            f"choose smaller widths in the model section. The device said: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def explained_compilation() -> Iterator[None]:
    """Turn a failure of torch.compile into a sentence.

    Raises:
        AlmrrError: the model could not be compiled inside the context.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    try:
        yield
    except TorchDynamoException as error:
        raise AlmrrError(
            "torch.compile could not compile the model; set train.compile to false, or install a C++ compiler if that "
            f"is what it misses. It said: {' '.join(str(error).split()[:40])}"
        ) from error
