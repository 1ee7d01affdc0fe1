"""Seeds that depend on names and numbers alone, and global torch state that is put back as it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on all the parts: equal parts, equal seed, on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def isolated_randomness() -> Iterator[None]:
    """Inside, torch's generators may be seeded at will; afterwards they stand where they stood."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def algorithms(*, deterministic: bool) -> Iterator[None]:
    """Choose torch's algorithms, and put the choice back afterwards.

    Deterministic: operations that have a deterministic form take it; one that has none on a GPU warns and runs.
    Otherwise cuDNN tries its convolutions and keeps the fastest.
    """
    with ExitStack() as stack:
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        for owner, name in (
            (torch.backends.cudnn, "benchmark"),
            (torch.backends.cudnn, "deterministic"),
            (torch.utils.deterministic, "fill_uninitialized_memory"),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
        stack.callback(_set_variable, _CUBLAS, os.environ.get(_CUBLAS))
        if deterministic:
            os.environ.setdefault(_CUBLAS, ":4096:8")  # cuBLAS is reproducible only with a fixed workspace
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        # Memory that is never read before it is written need not be filled; filling costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = not deterministic
        yield


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
