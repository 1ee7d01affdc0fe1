from __future__ import annotations

import os

import pytest

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.synthesis.writer import count_processes, spread_over


@pytest.mark.parametrize(
    ("requested", "work", "expected"),
    [(1, 10_000, 1), (4, 10_000, 4), (4, 250, 2), (4, 10, 1), (3, 0, 1)],
)
def test_no_more_processes_than_there_is_work_for(requested: int, work: int, expected: int) -> None:
    assert count_processes(requested, work=work, least_work=100) == expected


def test_zero_takes_one_process_per_core_that_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = count_processes(0, work=10**9, least_work=1)
    assert 1 <= cores <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert count_processes(0, work=10**9, least_work=1) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert count_processes(0, work=10**9, least_work=1) == cores


def test_results_come_in_the_order_of_the_tasks_from_several_processes() -> None:
    with spread_over(2) as spread:
        assert list(spread(abs, [-3, 2, -1])) == [3, 2, 1]


def test_one_process_is_this_one() -> None:
    seen = []
    with spread_over(1) as spread:
        list(spread(lambda task: len(seen.append(task) or seen), [1, 2]))
    assert seen == [1, 2]


def test_process_that_dies_is_an_error_with_a_remedy() -> None:
    with pytest.raises(AlmrrError, match=r"synthesis\.workers"), spread_over(2) as spread:
        list(spread(os._exit, [3]))
