"""Work on several threads whose results come in order, so that what is written never depends on who was faster."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


WAITING = 2
"""Results that may wait for whoever takes them, besides those that the threads work on."""


def default_threads() -> int:
    """As many as this process may use CPUs."""
    return len(os.sched_getaffinity(0))


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Yields function(item) for every item, in their order.

    Args:
        function: called on one of the threads; should release the interpreter where it works.
        items: taken one by one, as there is room for their results.
        threads: how many calls run at once.
        ahead: how many results are worked on or wait for whoever takes them, which bounds their memory.

    Closing the generator waits for the calls that run and starts no more.

    Raises:
        Whatever the function raises, in the place of its result.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="convert") as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(pending) >= ahead:
                    yield pending.popleft().result()
                pending.append(pool.submit(function, item))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
