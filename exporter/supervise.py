"""Runs a command in a child process, so that somebody is left to say a sentence when the kernel kills it.

The kernel ends a process that needs more memory than there is by SIGKILL, which nobody can catch. The parent is a small
process that only waits: it passes SIGINT and SIGTERM on, and the child's exit code up. Nothing heavy is imported before
the two part, and the child keeps the terminal. `--debug` does without, for debuggers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from glm_export.runtime.errors import GlmExportError, ResourceError

_PR_SET_PDEATHSIG = 1
_SAME_SIGNAL_S = 0.2


def supervised(work: Callable[[], int], explain: Callable[[GlmExportError], int]) -> int:
    """Runs `work` in a child process.

    Args:
        work: returns an exit code; called in the child.
        explain: tells the user of an error and returns its exit code; called in the parent.

    Returns:
        In the child, what `work` returns; in the parent, the child's exit code, or 128 + the signal that ended it.
    """
    parent = os.getpid()
    kills_before = _kills_for_memory()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        return work()
    with _passing_signals_on(child):
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    number = signal.Signals(-code)
    if number in (signal.SIGINT, signal.SIGTERM):  # its second one, which ends it at once
        return 128 + number
    if number == signal.SIGKILL:
        if _kills_for_memory() > kills_before:
            how = "the kernel killed it because memory ran out"
        else:
            how = "it was killed (SIGKILL), as the kernel does when memory runs out"
        return explain(
            ResourceError(
                f"The command ended early: {how}. Free some memory or use a machine with more; a build goes on where "
                "it was, takes less with --threads 1, and `glm-export plan` says how much."
            )
        )
    return explain(GlmExportError(f"The command was ended by {number.name}: this is a bug, please report it."))


@contextlib.contextmanager
def _passing_signals_on(child: int) -> Iterator[None]:
    received = 0

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal received
        received += 1
        if received == 1:
            # A terminal signals both of us, and so do some process managers; the child must not take one signal for
            # two. After its first it no longer catches the signal.
            time.sleep(_SAME_SIGNAL_S)
            if not _catches(child, number):
                return
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    chosen = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, pass_on) for each in chosen}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _die_with(parent: int) -> None:
    """Lets this process end when its parent is killed, so that no build goes on behind the user's back."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before we asked
        sys.exit(128 + signal.SIGKILL)


def _catches(process: int, number: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{process}/status") as file:
        for line in file:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _kills_for_memory() -> int:
    """How many processes the kernel has killed so far because memory ran out."""
    with contextlib.suppress(OSError), open("/proc/vmstat") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
