"""Two processes of one distributed training, as torchrun starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_training import SETTINGS, TOGETHER, build_model, build_synthetic_set, train

from almrr_pipeline.common.errors import AlmrrError

pytestmark = pytest.mark.xdist_group("processes")  # the fixture of that name runs once


@pytest.fixture(scope="module")
def ranks(processes: tuple[Path, dict[str, int]]) -> list[dict[str, Any]]:
    folder, ended = processes
    assert (ended["rank 0"], ended["rank 1"]) == (0, 0)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def test_processes_end_with_equal_parameters(ranks: list[dict[str, Any]]) -> None:
    names = [name for name, _ in build_model().named_parameters()]
    first, second = (rank["weights"] for rank in ranks)
    assert [name for name in names if not torch.equal(first[name], second[name])] == []


def test_the_main_process_alone_reports_and_goes_on(
    ranks: list[dict[str, Any]], processes: tuple[Path, dict[str, int]]
) -> None:
    assert [rank["reported"] for rank in ranks] == [[1, 2], []]
    assert [path.name for path in processes[0].glob("history_*.csv")] == ["history_0.csv"]


def test_processes_share_the_disk_for_kept_features(ranks: list[dict[str, Any]]) -> None:
    assert [rank["limits"] for rank in ranks] == [[2e9], [2e9]]  # of 4 GB


def test_the_history_is_that_of_one_process(
    ranks: list[dict[str, Any]], processes: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    """Reconstruction has no batch norm: at the first step a batch's halves average to the whole."""
    alone = train(
        build_model(drop_path=0.0),
        build_synthetic_set(),
        scratch=tmp_path,
        **{**SETTINGS, **TOGETHER},
    )
    shared = pd.read_csv(processes[0] / "history_0.csv")
    np.testing.assert_allclose(shared["reconstruction"][0], alone["reconstruction"][0], rtol=1e-5)
    np.testing.assert_allclose(shared["loss"], alone["loss"], rtol=0.1)


def test_checkpoints_are_removed_by_the_main_process(
    ranks: list[dict[str, Any]], processes: tuple[Path, dict[str, int]]
) -> None:
    assert list((processes[0] / "scratch").iterdir()) == []


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        AlmrrError, match=r"batch_size 3 cannot be divided equally among 2 devices; take 4"
    ):
        train(
            build_model(),
            build_synthetic_set(),
            scratch=tmp_path,
            **{**SETTINGS, "batch_size": 3, "devices": 2},
        )


def test_processes_end_together_though_one_alone_was_asked_to(
    processes: tuple[Path, dict[str, int]],
) -> None:
    folder, ended = processes
    assert (ended["rank 0 of those asked"], ended["rank 1 of those asked"]) == (128 + 15, 128 + 15)
    assert [path.name for path in (folder / "asked").rglob("*.ckpt")] == ["step_000000002.ckpt"]


def test_a_second_distributed_training_in_a_process_is_refused(tmp_path: Path) -> None:
    rendezvous = (tmp_path / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        with pytest.raises(AlmrrError, match=r"one category and seed per process.*--namespaces"):
            train(
                build_model(), build_synthetic_set(), scratch=tmp_path, **{**SETTINGS, "devices": 2}
            )
    finally:
        torch.distributed.destroy_process_group()
