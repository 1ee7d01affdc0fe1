"""A training that was killed and run again ends bit-identical to an uninterrupted one."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny_training import SETTINGS, build_model, build_synthetic_set, train

from almrr_pipeline.training.runtime import deferred_sigterm
from almrr_pipeline.training.train import TrainingInterrupted

pytestmark = pytest.mark.xdist_group("processes")  # the fixture of that name runs once


def differences(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """Names of the values that are not bit-identical."""
    mine, theirs = one.state_dict(), other.state_dict()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def checkpoints_in(scratch: Path) -> list[str]:
    return sorted(path.name for path in scratch.rglob("step_*.ckpt"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = build_model(standardize=True)
    return model, train(
        model, build_synthetic_set(), scratch=tmp_path_factory.mktemp("uninterrupted"), **SETTINGS
    )


@pytest.mark.parametrize(
    ("death", "status", "left"),
    [
        ("killed between checkpoints", -9, ["step_000000003.ckpt", "step_000000006.ckpt"]),
        ("killed while writing a checkpoint", -9, ["step_000000003.ckpt"]),
        ("asked to end", 128 + 15, ["step_000000003.ckpt", "step_000000004.ckpt"]),
    ],
)
def test_an_interrupted_training_ends_bit_identical(
    processes: tuple[Path, dict[str, int]],
    uninterrupted: Any,
    death: str,
    status: int,
    left: list[str],
) -> None:
    folder, ended = processes
    scratch = folder / death
    assert ended[death] == status
    assert checkpoints_in(scratch) == left

    model = build_model(standardize=True)
    reported: list[int] = []
    history = train(
        model,
        build_synthetic_set(),
        scratch=scratch,
        on_metrics=lambda step, _: reported.append(step),
        **SETTINGS,
    )

    expected, expected_history = uninterrupted
    assert differences(model, expected) == []
    pd.testing.assert_frame_equal(history, expected_history, check_exact=True)
    assert reported == [2, 4, 6, 8, 9]  # rows from before the interruption are reported again
    assert list(scratch.iterdir()) == []


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scratch folder with the checkpoints of steps 3 and 6."""
    scratch = tmp_path_factory.mktemp("interrupted")

    def fail(step: int, _: Any) -> None:
        if step == 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(
            build_model(standardize=True),
            build_synthetic_set(),
            scratch=scratch,
            on_metrics=fail,
            **SETTINGS,
        )
    return scratch


@pytest.mark.parametrize(
    ("change", "resumes"),
    [
        ({}, True),
        ({"workers": 1, "checkpoint_every": 5}, True),
        ({"learning_rate": 1e-3}, False),
        ({"fingerprint": "new data"}, False),
        ({"seed": 5}, False),
        ({"steps": 8}, False),
    ],
    ids=str,
)
def test_a_training_goes_on_if_all_that_decides_its_result_is_equal(
    interrupted: Path, tmp_path: Path, caplog: Any, change: dict[str, Any], resumes: bool
) -> None:
    scratch = shutil.copytree(interrupted, tmp_path / "scratch")
    with caplog.at_level(logging.INFO, logger="almrr_pipeline"):
        train(
            build_model(standardize=True),
            build_synthetic_set(),
            scratch=scratch,
            **{**SETTINGS, **change},
        )
    assert ("Resuming from the checkpoint" in caplog.text) == resumes
    assert f"from step {6 if resumes else 0} to" in caplog.text


@pytest.mark.parametrize(
    ("damaged", "then"), [(1, "; trying {older}."), (2, "; the training begins again.")]
)
def test_a_damaged_checkpoint_costs_steps_but_changes_nothing(
    interrupted: Path,
    uninterrupted: Any,
    tmp_path: Path,
    caplog: Any,
    damaged: int,
    then: str,
) -> None:
    scratch = shutil.copytree(interrupted, tmp_path / "scratch")
    checkpoints = sorted(scratch.rglob("*.ckpt"), reverse=True)
    for path in checkpoints[:damaged]:
        path.write_bytes(path.read_bytes()[:1000])
    model = build_model(standardize=True)
    history = train(model, build_synthetic_set(), scratch=scratch, **SETTINGS)
    assert f"{checkpoints[0].name} is unusable" in caplog.text
    assert then.format(older=checkpoints[1].name) in caplog.text
    assert differences(model, uninterrupted[0]) == []
    pd.testing.assert_frame_equal(history, uninterrupted[1], check_exact=True)


@pytest.fixture
def interrupting() -> Iterator[Any]:
    """Python's own handler of Ctrl-C; a shell starts background jobs with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_passed_on_and_still_works_afterwards(tmp_path: Path, interrupting: Any) -> None:
    def press(step: int, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(build_model(), build_synthetic_set(), scratch=tmp_path, on_metrics=press, **SETTINGS)
    assert signal.getsignal(signal.SIGINT) is interrupting


@pytest.fixture
def terminations() -> Iterator[list[int]]:
    """The SIGTERMs that reach the caller's own handler."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_fit_by_an_exception_of_its_own(
    tmp_path: Path, terminations: list[int]
) -> None:
    def terminate(step: int, _: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after step 2"):
        train(
            build_model(), build_synthetic_set(), scratch=tmp_path, on_metrics=terminate, **SETTINGS
        )
    assert checkpoints_in(tmp_path) == ["step_000000002.ckpt"]
    os.kill(os.getpid(), signal.SIGTERM)
    assert terminations == [signal.SIGTERM]  # the first one was for the training alone


def test_sigterm_after_the_last_step_reaches_the_caller(terminations: list[int]) -> None:
    with deferred_sigterm() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert terminations == []
    assert terminations == [signal.SIGTERM]


def test_training_in_another_thread_than_the_main_one_works(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        history = pool.submit(
            train, build_model(), build_synthetic_set(), scratch=tmp_path, **SETTINGS
        ).result()
    assert history is not None
    assert history["step"].tolist() == [2, 4, 6, 8, 9]
