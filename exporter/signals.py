"""SIGINT and SIGTERM as an exception, so that a stopped command cleans up like a failed one.

What is on disk when it arrives stays resumable: files get their final names only when they are complete.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked to stop. No Exception, so that nobody takes it for a failure and goes on."""


@contextmanager
def interruptible() -> Iterator[list[signal.Signals]]:
    """Raises Interrupted on the first SIGINT or SIGTERM and lets a second one end the process at once.

    Yields the signals that arrived: a library may turn the exception into one of its own.
    """
    received: list[signal.Signals] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(received[0].name)

    main = threading.current_thread() is threading.main_thread()
    # What the parent chose to ignore (nohup, a background job) stays ignored.
    chosen = [each for each in _STOPPING if main and signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, interrupt) for each in chosen}
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
