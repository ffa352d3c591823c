from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from glm_export.exporter.pipeline import in_order


def test_results_come_in_order_whoever_is_faster() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    for threads, ahead in ((1, 1), (2, 2), (4, 6), (3, 1)):
        assert list(in_order(slow_first, range(20), threads=threads, ahead=ahead)) == [i * i for i in range(20)]
    assert list(in_order(slow_first, [], threads=2, ahead=4)) == []


def test_no_more_than_so_many_are_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(20):
            taken += 1
            yield item

    for done, _ in enumerate(in_order(lambda item: item, items(), threads=2, ahead=3), start=1):
        assert taken <= done + 3


def test_calls_run_at_once() -> None:
    both = threading.Barrier(2, timeout=10)  # breaks unless two calls wait together
    assert len(list(in_order(lambda _: both.wait(), range(4), threads=2, ahead=2))) == 4


def test_an_error_comes_in_its_place_and_nothing_is_started_after() -> None:
    started = []

    def failing(item: int) -> int:
        started.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(failing, range(100), threads=1, ahead=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(started) <= 6


def test_closing_waits_for_what_runs() -> None:
    running, ended = threading.Event(), []

    def work(item: int) -> int:
        running.set()
        time.sleep(0.1)
        ended.append(item)
        return item

    results = in_order(work, range(100), threads=1, ahead=4)
    next(results)
    results.close()
    count = len(ended)
    assert count <= 5
    time.sleep(0.2)
    assert len(ended) == count
