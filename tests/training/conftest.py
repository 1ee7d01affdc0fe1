"""What the training's tests share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from almrr_pipeline.model.almrr import ALMRR

sys.path.insert(
    0, str(Path(__file__).parent)
)  # for tiny_training, which the test modules import too
import tiny_training
from tiny_training import build_model, build_synthetic_set

from almrr_pipeline.synthesis.synthetic_set import SyntheticSet

Train = Callable[..., pd.DataFrame]


@pytest.fixture
def synthetic_set() -> SyntheticSet:
    return build_synthetic_set()


@pytest.fixture
def model() -> ALMRR:
    return build_model()


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """`fit` with small settings; any argument can be given."""
    return partial(
        tiny_training.train,
        steps=4,
        batch_size=2,
        learning_rate=1e-3,
        scratch=tmp_path / "scratch",
        fingerprint="test",
        seed=3,
        accelerator="cpu",
        checkpoint_every=2,
        log_every=2,
    )


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The folder that processes.py left its files in, and how each of its processes ended."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(Path(__file__).with_name("processes.py")), str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder, json.loads(done.stdout)


@pytest.fixture(autouse=True)
def one_thread(set_torch_threads: Callable[[int], None]) -> None:
    """Small tensors gain nothing from threads."""
    set_torch_threads(1)
