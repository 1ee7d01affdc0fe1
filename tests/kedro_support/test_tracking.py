from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from almrr_pipeline.kedro_support.tracking import (
    LONGEST_VALUE,
    flatten,
    git_commit,
    helps_another_process,
    numbers,
    run_tags,
)


def test_parameters_are_flattened_to_the_leaf() -> None:
    values = {"train": {"steps": 3, "sizes": [1, 2]}, "overrides": {}, "seed": 0}
    assert flatten(values) == {
        "train.steps": "3",
        "train.sizes": "[1, 2]",
        "overrides": "{}",
        "seed": "0",
    }


def test_no_value_is_longer_than_mlflow_takes() -> None:
    assert len(flatten({"addresses": "x" * 10_000})["addresses"]) == LONGEST_VALUE


def test_only_the_numbers_of_a_category_become_metrics() -> None:
    metrics = {
        "pixel_auroc": 0.5,
        "image_auroc": None,
        "counts": {"test": 3},
        "suite": "x",
        "flag": True,
    }
    assert numbers(metrics) == {"pixel_auroc": 0.5}


def test_a_run_outside_of_git_says_so(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None


def test_a_run_names_its_commit_and_whether_files_differ(tmp_path: Path) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "one"]):
        (tmp_path / "file").write_text("one")
        (tmp_path / "dvc.lock").write_text("one")
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = git_commit(tmp_path)
    (tmp_path / "dvc.lock").write_text("two")
    assert clean is not None
    assert len(clean) == 12
    assert git_commit(tmp_path) == clean
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{clean} with changes"


def test_an_experiment_of_dvc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "bold-move")
    tags = run_tags(tmp_path, stage="train", category="nanotwice", seed="3")
    assert tags == {
        "stage": "train",
        "category": "nanotwice",
        "seed": "3",
        "git_commit": "unknown",
        "dvc_experiment": "bold-move",
    }


@pytest.mark.parametrize(
    ("ranks", "helps"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, True),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, True),  # Lightning's launcher, second machine
        ({"SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "3"}, True),
        ({"RANK": "0", "GROUP_RANK": "0", "LOCAL_RANK": "0"}, False),
        ({"RANK": "1", "GROUP_RANK": "1", "LOCAL_RANK": "0"}, True),  # torchrun, second machine
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, False),  # torchrun under srun
        ({"RANK": "1", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, True),
    ],
)
def test_of_processes_that_train_together_only_the_first_logs(
    monkeypatch: pytest.MonkeyPatch, ranks: dict[str, str], helps: bool
) -> None:
    for name in ("RANK", "GROUP_RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, rank in ranks.items():
        monkeypatch.setenv(name, rank)
    assert helps_another_process() == helps
