from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from graphlib import CycleError
from threading import Barrier

import pytest

from almrr_pipeline.scale.side_by_side import run_side_by_side

NEEDS = {
    "shared": set(),
    "fetch_a": set(), "train_a": {"fetch_a", "shared"},
    "fetch_b": set(), "train_b": {"fetch_b", "shared"},
    "baseline_b": {"fetch_b"},
    "report": {"train_a", "train_b", "baseline_b"},
}  # fmt: skip


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_a_unit_starts_when_all_that_it_needs_is_finished(threads: ThreadPoolExecutor) -> None:
    finished: list[str] = []

    def start(unit: str) -> Future[None]:
        assert NEEDS[unit] <= set(finished)
        return threads.submit(lambda: None)

    assert run_side_by_side(NEEDS, start, lambda unit, _: finished.append(unit)) == {}
    assert sorted(finished) == sorted(NEEDS)


def test_a_failure_leaves_all_going_that_does_not_need_it(threads: ThreadPoolExecutor) -> None:
    finished: list[str] = []

    def work(unit: str) -> None:
        if unit == "train_a":
            raise ValueError("bad images")

    failures = run_side_by_side(
        NEEDS, lambda unit: threads.submit(work, unit), lambda unit, _: finished.append(unit)
    )
    assert {unit: str(error) for unit, error in failures.items()} == {"train_a": "bad images"}
    assert set(finished) == NEEDS.keys() - {"train_a", "report"}


def test_two_units_run_at_the_same_time_and_no_more(threads: ThreadPoolExecutor) -> None:
    meet, running, most = Barrier(2, timeout=10), set(), []

    def work(unit: str) -> None:
        running.add(unit)
        most.append(len(running))
        meet.wait()  # breaks if a unit is alone
        running.discard(unit)

    units: dict[str, set[str]] = {name: set() for name in "abcd"}
    start = lambda unit: threads.submit(work, unit)  # noqa: E731
    assert run_side_by_side(units, start, lambda *_: None, most=2) == {}
    assert max(most) == 2


def test_the_longest_way_goes_first() -> None:
    order: list[str] = []
    run_side_by_side(NEEDS, order.append, lambda *_: None, most=1)
    assert order.index("baseline_b") > order.index("train_b")
    assert order[-1] == "report"


def test_units_that_need_each_other_are_refused() -> None:
    with pytest.raises(CycleError):
        run_side_by_side({"a": {"b"}, "b": {"a"}}, lambda _: None, lambda *_: None)
