"""Progress on anything over a second: a live bar on a terminal, plain lines elsewhere, nothing when quiet.

Everything goes to stderr; stdout is for results.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

_LINE_EVERY_S = 5.0

Advance = Callable[[int], None]


class Reporter:
    """Reports stages, one after the other."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, quiet=quiet, highlight=False)

    def note(self, text: str) -> None:
        """One line, as it is."""
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total_bytes: int | None = None) -> Iterator[Advance]:
        """Shows a stage while it runs.

        The function it gives takes the number of bytes done since the last call, from any thread.
        """
        started = time.monotonic()
        if self._console.is_terminal and not self._quiet:
            with self._bar(total_bytes) as bar:
                task = bar.add_task(title, total=total_bytes)
                yield lambda done: bar.update(task, advance=done)
        else:
            yield self._lines(title, total_bytes)
        self.note(f"{title}: {time.monotonic() - started:.1f} s")

    @contextmanager
    def phases(self, title: str) -> Iterator[Callable[[float, str], None]]:
        """Shows a stage that counts no bytes; the function it gives takes the fraction done, and what is being done."""
        started = time.monotonic()
        if self._console.is_terminal and not self._quiet:
            with self._bar(None) as bar:
                task = bar.add_task(title, total=1.0)
                yield lambda done, what: bar.update(task, completed=done, description=f"{title}: {what.lower()}")
        else:
            yield self._percentages(title)
        self.note(f"{title}: {time.monotonic() - started:.1f} s")

    def _bar(self, total_bytes: int | None) -> Progress:
        columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
        if total_bytes is not None:
            columns += [DownloadColumn(binary_units=False), TransferSpeedColumn()]
        return Progress(*columns, console=self._console, transient=True)

    def _lines(self, title: str, total_bytes: int | None) -> Advance:
        done_bytes, last = 0, time.monotonic()
        lock = threading.Lock()

        def advance(done: int) -> None:
            nonlocal done_bytes, last
            with lock:
                done_bytes += done
                if total_bytes and time.monotonic() - last > _LINE_EVERY_S:
                    last = time.monotonic()
                    percent = 100 * done_bytes / total_bytes
                    self.note(f"{title}: {done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB ({percent:.0f}%)")

        return advance

    def _percentages(self, title: str) -> Callable[[float, str], None]:
        last = time.monotonic()

        def show(done: float, what: str) -> None:
            nonlocal last
            if time.monotonic() - last > _LINE_EVERY_S:
                last = time.monotonic()
                self.note(f"{title}: {100 * done:.0f}%, {what.lower()}")

        return show
