"""What a planned build will take: memory, disk, time, and the GPUs its bundle needs. Refuses what can not fit."""

from __future__ import annotations

import dataclasses
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm_export.exporter.gpus import GPUS, gpus_needed
from glm_export.exporter.layout import QUANTIZED
from glm_export.exporter.pipeline import WAITING
from glm_export.exporter.plan import BuildPlan
from glm_export.exporter.precision import compute_dtype
from glm_export.exporter.rates import Rates, measure
from glm_export.exporter.staging import bytes_left
from glm_export.exporter.storage import Block
from glm_export.runtime.errors import ResourceError

# Measured, see bench/RESULTS.md: what the imports take, and what tracing adds per model and per layer.
_PROGRAM_BYTES, _TRACE_BYTES, _TRACE_LAYER_BYTES = 315_000_000, 100_000_000, 2_600_000
_START_S, _TRACE_S, _TRACE_LAYER_S = 3.0, 1.0, 0.62
_GRAPH_BYTES, _GRAPH_LAYER_BYTES = 12_000, 15_000
_KEPT = 2.3
"""The allocator keeps blocks that were freed for the next ones, so that memory is this many times what is in use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of a build."""

    name: str
    reads: int
    """Bytes."""
    writes: int
    memory: int
    """Resident at its peak."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a build takes and what there is, in bytes; make one with `of`."""

    threads: int
    stages: tuple[Stage, ...]
    disk_free: int
    memory_free: int
    rates: Rates
    gpu_weights: int
    gpu_cache: int
    """Of a session at the recipe's batch and capacity."""
    gpus: dict[str, int]
    """How many of each kind hold weights and cache."""

    @classmethod
    def of(cls, plan: BuildPlan, out: Path, threads: int) -> Estimate:
        """Estimates the build of `out`, after measuring for a second or two.

        Raises:
            ResourceError: it can not fit; nothing is measured then.
        """
        folder = _existing(out.absolute().parent)
        check_memory(plan, threads)
        check_disk(sum(stage.writes for stage in _stages(plan, threads, None)) - bytes_left(out), folder)
        rates = measure(plan, folder, threads)
        weights, cache = sum(file.layout.size for file in plan.files), _cache_bytes(plan)
        return cls(
            threads=threads,
            stages=_stages(plan, threads, rates),
            disk_free=shutil.disk_usage(folder).free,
            memory_free=_memory_free(),
            rates=rates,
            gpu_weights=weights,
            gpu_cache=cache,
            gpus={gpu.name: gpus_needed(weights + cache, gpu) for gpu in GPUS},
        )

    @property
    def disk(self) -> int:
        """Size of the bundle."""
        return sum(stage.writes for stage in self.stages)

    @property
    def memory(self) -> int:
        """Resident at its peak."""
        return max(stage.memory for stage in self.stages)

    @property
    def seconds(self) -> float:
        """From start to end."""
        return sum(stage.seconds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        totals = {"disk": self.disk, "memory": self.memory, "seconds": self.seconds}
        return dataclasses.asdict(self) | totals


def check_memory(plan: BuildPlan, threads: int) -> None:
    """Refuses a build for which there is not enough memory.

    Raises:
        ResourceError: with what is needed and what is there.
    """
    needed, free = max(stage.memory for stage in _stages(plan, threads, None)), _memory_free()
    if needed > free:
        raise ResourceError(
            f"The build needs {needed / 1e9:.2f} GB of memory with {threads} threads and {free / 1e9:.2f} GB are free; "
            "free some, or use fewer --threads."
        )


def check_disk(needed: int, folder: Path) -> None:
    """Refuses a build for which there is not enough room on the disk of a folder.

    Raises:
        ResourceError: with what is needed and what is there.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"The bundle needs {needed / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB free; "
            "free some space or build elsewhere."
        )


def _stages(plan: BuildPlan, threads: int, rates: Rates | None) -> tuple[Stage, ...]:
    """The stages in their order; without rates, nothing is known of the time of the weights."""
    layers = plan.config.num_hidden_layers
    copied = sum(path.stat().st_size for path in plan.copied)
    source = sum(file.source_bytes for file in plan.weight_files)
    traced = _PROGRAM_BYTES + _TRACE_BYTES + layers * _TRACE_LAYER_BYTES
    slower = rates.slower if rates else 1.0
    return (
        Stage(name="small files", reads=copied, writes=copied, memory=_PROGRAM_BYTES, seconds=_START_S * slower),
        Stage(
            name="graph",
            reads=0,
            writes=_GRAPH_BYTES + layers * _GRAPH_LAYER_BYTES,
            memory=traced,
            seconds=(_TRACE_S + layers * _TRACE_LAYER_S) * slower,
        ),
        Stage(
            name="weights",
            reads=source,
            writes=sum(file.layout.size for file in plan.weight_files),
            memory=traced + _conversion_bytes(plan, threads),
            seconds=source / rates.convert if rates and rates.convert else 0.0,
        ),
    )


def _conversion_bytes(plan: BuildPlan, threads: int) -> int:
    """Blocks on their way, and the small tensors of a file, which wait until its large ones are written."""
    if plan.checkpoint is None:
        return 0
    largest = max(_block_bytes(block, plan) for file in plan.files for block in file.blocks(plan.checkpoint))
    small = max(sum(tensor.nbytes for tensor in file.layout.tensors if tensor.small) for file in plan.files)
    return round(_KEPT * (threads + WAITING) * largest) + small


def _block_bytes(block: Block, plan: BuildPlan) -> int:
    """What a block takes while it is converted: what is read, what is stored, and float32 numbers in between."""
    precision = plan.recipe.precision
    stored = 1 if precision in QUANTIZED else compute_dtype(precision).itemsize
    again = 12 if block.piece.scheme and not block.piece.row_scaled else 0
    return block.source_bytes + (stored + again) * block.elements


def _cache_bytes(plan: BuildPlan) -> int:
    capacity = min(plan.recipe.runtime.capacity, plan.config.max_position_embeddings)
    sizes = {"B": plan.recipe.runtime.batch, "C": capacity}
    return sum(
        math.prod(sizes[d] if isinstance(d, str) else d for d in cache.shape) * getattr(torch, cache.dtype).itemsize
        for cache in plan.contract.caches()
    )


def _memory_free() -> int:
    """What this process may still take, by the machine and by its control group."""
    with open("/proc/meminfo") as file:
        found = dict(line.split(":", 1) for line in file)
    free = int(found["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError, KeyError):  # no such controller, or no limit
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        used -= int(
            dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
        )  # the page cache makes way
        free = min(free, limit - used)
    return free


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
