"""How fast this machine builds: a sample of the blocks of a plan goes the way that all of them would go.

What is written is a temporary file beside the bundle's place, on the same disk.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from glm_export.exporter.layout import QUANTIZED
from glm_export.exporter.page_cache import forget, too_large_to_stay
from glm_export.exporter.pipeline import WAITING, in_order
from glm_export.exporter.plan import BuildPlan
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.storage import Block, Converted, convert
from glm_export.exporter.weight_file import as_bytes
from glm_export.plugins.fp8_native import quantize_rows
from glm_export.runtime.files import HashingWriter

_READ_S, _QUANTIZE_S, _CONVERT_S = 0.4, 0.1, 2.0


_RUN, _MOST_RUNS = 64, 256  # blocks, runs
_UNIT_S = 0.0102  # of _slower's sum, on the machine of bench/RESULTS.md


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """In bytes of the checkpoint per second; None where nothing is read, or nothing quantized."""

    read: float | None
    """One thread, from wherever the checkpoint is now: disk or page cache."""
    quantize: float | None
    """To FP8, per CPU, from memory."""
    convert: float | None
    """All together: read, convert, hash, write and sync, on all threads."""
    slower: float
    """How many times longer than on the machine of bench/RESULTS.md Python takes, with what else is running."""


def measure(plan: BuildPlan, folder: Path, threads: int) -> Rates:
    """Measures for a second or two.

    Args:
        plan: what is to be built.
        folder: where the bundle goes.
        threads: as in the build.
    """
    checkpoint, precision, slower = plan.checkpoint, plan.recipe.precision, _slower()
    if checkpoint is None:
        return Rates(read=None, quantize=None, convert=None, slower=slower)
    every = [block for file in plan.weight_files for block in file.blocks(checkpoint)]
    first, *sample = _sample(every)
    convert(checkpoint, first, precision)  # loads what is loaded at first use

    started, read = time.perf_counter(), 0
    while not read or (sample and time.perf_counter() - started < _READ_S):
        block = sample.pop(0) if sample else first
        checkpoint.read_numbers(block.piece, block.first, block.last)
        read += block.source_bytes
    read_rate = read / (time.perf_counter() - started)
    rate = _quantize_rate(checkpoint, every, QUANTIZED[precision]) if precision in QUANTIZED else None

    drop = too_large_to_stay(plan)

    def convert_and_forget(block: Block) -> Converted:
        converted = convert(checkpoint, block, precision)
        if drop:
            forget(checkpoint, block)
        return converted

    def until_time_is_up() -> Iterator[Block]:
        until = time.perf_counter() + _CONVERT_S
        for block in sample or [first]:
            yield block
            if time.perf_counter() > until:
                return

    done, started = 0, time.perf_counter()
    converted = in_order(convert_and_forget, until_time_is_up(), threads=threads, ahead=threads + WAITING)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".glm-export-plan-") as temporary,
        HashingWriter(Path(temporary) / "sample") as writer,
        closing(converted),
    ):
        for each in converted:
            for _, part in each.stored:
                writer.write(as_bytes(part))
            done += each.block.source_bytes
    together = done / (time.perf_counter() - started)  # on disk by now
    return Rates(read=read_rate, quantize=rate, convert=together, slower=slower)


def _sample(every: list[Block]) -> list[Block]:
    """Runs of neighbours, as a build reads them, from all over the checkpoint.

    So the part of it that is in the page cache has its share; others every time, for these will be there afterwards.
    """
    starts = list(range(0, len(every), _RUN))
    random.shuffle(starts)
    return [block for start in starts[:_MOST_RUNS] for block in every[start : start + _RUN]]


def _slower() -> float:
    started = time.perf_counter()
    for _ in range(10):
        sum(i * i for i in range(200_000))
    return (time.perf_counter() - started) / (10 * _UNIT_S)


def _quantize_rate(checkpoint: Checkpoint, every: list[Block], kinds: Collection[str]) -> float | None:
    block = max(every, key=lambda block: (block.parameter.kind in kinds, block.source_bytes))
    source = checkpoint.read_numbers(block.piece, block.first, block.last)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < _QUANTIZE_S:
        quantize_rows(source)
        done += source.nbytes
    return done / (time.perf_counter() - started)
