"""The machine that a benchmark runs on: its bandwidth and arithmetic at this moment, and what a process takes of it."""

from __future__ import annotations

import mmap
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glm_export.plugins import meter
from glm_export.plugins.library import forced_cpu
from glm_export.runtime.large_pages import map_file

_SMALLEST, _PER_THREAD = 256 << 20, 64 << 20  # bytes: several times what a CPU caches
_PASSES = 5
_SPINNING_S = 0.1
"""How long to wait for CPUs that still spin: ONNX Runtime's threads do so for some 50 ms after their last work."""

_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the machine can do at a moment, on all threads together."""

    bandwidth: float
    """Bytes per second, read in order from anonymous memory in large pages."""
    flops: float
    """Products and sums per second, in the arithmetic of `Machine`."""

    @classmethod
    def mean(cls, *rates: Rates) -> Rates:
        """Their mean, for what ran between them."""
        return cls(
            bandwidth=statistics.mean(each.bandwidth for each in rates),
            flops=statistics.mean(each.flops for each in rates),
        )


class Machine:
    """Measures the machine with a number of threads. It holds the memory that is read."""

    arithmetic: str
    """What `flops` counts: bf16 where the machine has dot products of bf16, else float32."""

    def __init__(self, *, threads: int, bf16: bool) -> None:
        """Allocates and warms up.

        Args:
            threads: how many read and compute.
            bf16: whether bf16 dot products count, where the machine has them: the models that use them.
        """
        self.threads = threads
        self._memory = _large_pages(max(_SMALLEST, _PER_THREAD * threads))
        with forced_cpu(""):  # of the machine, not of the kernels that somebody chose
            has_bf16 = bf16 and meter.multiply("bfloat16", threads=threads) is not None
        self.arithmetic = "bfloat16" if has_bf16 else "float32"
        self.rates()

    def rates(self) -> Rates:
        """The rates now; takes some tenths of a second."""
        time.sleep(_SPINNING_S)
        with forced_cpu(""):
            flops = [meter.multiply(self.arithmetic, threads=self.threads) or 0.0 for _ in range(_PASSES)]
            return Rates(bandwidth=self._bandwidth(self._memory), flops=statistics.median(flops))

    def survey(self, file: Path) -> dict[str, float]:
        """Bytes per second by what is read and how; the file is one of the weights, mapped as a session maps it."""
        found = {}
        time.sleep(_SPINNING_S)
        with forced_cpu(""):
            for what, memory in (("memory", self._memory), ("mapped file", _mapped(file))):
                self._bandwidth(memory)
                found[f"{what}, in order"] = self._bandwidth(memory)
                found[f"{what}, blocks of 3 MiB in random order"] = self._bandwidth(memory, meter.BLOCK_BYTES)
        return found

    def _bandwidth(self, memory: _Words, block_bytes: int | None = None) -> float:
        passes = [meter.read(memory, threads=self.threads, block_bytes=block_bytes) for _ in range(_PASSES)]
        return memory.nbytes / statistics.median(each.seconds for each in passes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Bytes of this process that are in memory."""

    file: int
    """Mapped from files: the weights, programs. The system can drop them and read them again."""
    anonymous: int
    """The process' own: caches, scratch, whatever Python made."""
    peak: int
    """The most there ever were of both."""

    @classmethod
    def now(cls) -> Resident:
        """At this moment."""
        text = Path("/proc/self/status").read_text()
        sizes = {name: int(size) << 10 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
        return cls(
            file=sizes["RssFile"] + sizes["RssShmem"],
            anonymous=sizes["RssAnon"],
            # The kernel counts a peak now and then, the present more often.
            peak=max(sizes["VmHWM"], sizes["VmRSS"]),
        )


def _large_pages(size: int) -> _Words:
    """Anonymous memory in large pages where the system gives them, all of it there: nobody has to wait for a page."""
    memory: Any = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    words = np.frombuffer(memory, np.uint64)
    words[:] = 1
    return words


def _mapped(file: Path) -> _Words:
    memory = map_file(file)
    return np.frombuffer(memory, np.uint64, count=len(memory) // 8)
