from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from almrr_pipeline.inference.streams import submit_ahead, take_batches


def _map_ahead(function: Callable, items: Iterable, **options: int) -> Iterator:
    for _, future in submit_ahead(function, items, **options):
        yield future.result()


def _double(value: int) -> int:
    return 2 * value


@settings(deadline=None)
@given(st.lists(st.integers()), st.integers(1, 6), st.integers(1, 4))
def test_results_keep_the_order_of_the_items(items: list[int], ahead: int, threads: int) -> None:
    assert list(_map_ahead(_double, items, ahead=ahead, threads=threads)) == [
        2 * item for item in items
    ]


def test_no_more_items_are_drawn_than_allowed() -> None:
    drawn = []

    def count() -> Iterator[int]:
        for value in itertools.count():
            drawn.append(value)
            yield value

    results = _map_ahead(_double, count(), ahead=3)
    assert [next(results), next(results)] == [0, 2]
    assert len(drawn) == 2 + 3
    results.close()


def test_work_runs_in_other_threads_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=10)  # broken unless two calls are under way at once

    def meet(_: int) -> int:
        meeting.wait()
        return threading.get_ident()

    assert threading.get_ident() not in list(_map_ahead(meet, range(2), ahead=2, threads=2))


def test_an_error_comes_at_its_items_turn() -> None:
    results = _map_ahead(lambda value: 1 // value, [1, 1, 0, 1], ahead=4)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_items_after_an_error_go_on() -> None:
    outcomes = [
        (item, future.exception() is None)
        for item, future in submit_ahead(lambda value: 1 // value, [1, 0, 2], ahead=2)
    ]
    assert outcomes == [(1, True), (0, False), (2, True)]


def test_closing_early_ends_the_threads() -> None:
    before = threading.active_count()
    results = _map_ahead(_double, itertools.count(), ahead=4)
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before


@settings(deadline=None)
@given(st.lists(st.integers()), st.integers(1, 7))
def test_batches_are_full_but_for_the_last(items: list[int], size: int) -> None:
    batches = list(take_batches(items, size))
    assert list(itertools.chain.from_iterable(batches)) == items
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(batches)
