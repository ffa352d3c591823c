"""Before an engine is built: whether it can be, on this machine and for that GPU, and what it will take."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx

from glm_export.exporter.layout import QUANTIZED
from glm_export.exporter.recipe import Engine
from glm_export.plugins.external_data import external_tensors
from glm_export.runtime import cuda
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import BackendError, ResourceError, UsageError
from glm_export.runtime.session import numpy_dtype
from glm_export.runtime.tensorrt_library import Library, load_library

FP8_CACHE = "float8_e4m3fn"

_OLDEST = "8.0"
"""The compute capability from which on there are kernels of ours."""
_OLDEST_FP8 = "8.9"
_MOE_LAYER = ("10.0", "10.3", "11.0")
"""Where TensorRT has its own layer of experts."""

# Measured with TensorRT-RTX 1.7 on a CPU, see bench/RESULTS.md: beside the weights' files the library holds one copy of
# all weights, as much again as one large tensor, and itself. Of full TensorRT nothing is measured.
_LIBRARY_BYTES = 400_000_000
_KERNEL_BYTES = 40_000_000
_SECONDS_PER_GB = 8.0
_SECONDS_PER_LAYER = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where an engine can be built: the library, and the GPUs that it is built for."""

    library: Library
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    """The GPU here, when the engine is for that one."""


def check_machine(target: str, precision: str, engine: Engine) -> Machine:
    """Finds what an engine is built with and for, before anything is built.

    Raises:
        BackendError: the library or the GPU is missing, or the GPU can not run such an engine.
        UsageError: the experts can not be computed in that form.
    """
    library = load_library(target)
    here = None if library.is_rtx else cuda.gpu()
    capabilities = (here.compute_capability,) if here else engine.compute_capabilities
    if precision == "fp32":
        raise BackendError(f"The target {target} has no float32 experts: build a bundle in bf16, fp16 or fp8.")
    for capability in capabilities:
        _check_capability(capability, precision, engine, here)
    if engine.experts == "trt_moe" and precision not in ("bf16", "fp16"):
        raise UsageError(f"engine.experts trt_moe computes in bf16 and fp16, not in {precision}; leave it at plugin.")
    if engine.experts == "trt_moe" and not set(capabilities) <= set(_MOE_LAYER):
        raise BackendError(
            f"engine.experts trt_moe needs the target tensorrt and compute capability {', '.join(_MOE_LAYER)}, this "
            f"engine is for {', '.join(capabilities)}: leave it at plugin."
        )
    return Machine(library=library, compute_capabilities=capabilities, gpu=here.name if here else None)


def _check_capability(capability: str, precision: str, engine: Engine, here: cuda.Gpu | None) -> None:
    which = f"{here.name} has compute capability {capability}" if here else f"compute capability {capability} is asked"
    if _number(capability) < _number(_OLDEST):
        raise BackendError(f"{which}, the kernels of router and experts need {_OLDEST}: use the target onnxruntime.")
    fp8 = precision in QUANTIZED
    if (fp8 or engine.cache_dtype == "fp8") and _number(capability) < _number(_OLDEST_FP8):
        other = "a bf16 bundle" if fp8 else "cache_dtype compute"
        raise BackendError(f"{which}, FP8 needs {_OLDEST_FP8} or more: use {other}, or another GPU.")


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What an engine takes. Sizes in bytes."""

    weight_bytes: int
    plan_bytes: int
    peak_bytes: int
    """Of host memory, with the pages of the weights' files."""
    held_bytes: int
    """Of host memory, without them."""
    gpu_bytes: int
    """When it runs: weights and KV caches, without activations."""
    seconds: float


def estimate(bundle: Bundle, model: onnx.ModelProto, *, batch: int, capacity: int, cache_dtype: str) -> Estimate:
    """Computes an estimate.

    Args:
        bundle: the engine's.
        model: its graph, without weights.
        batch: most rows.
        capacity: tokens per row.
        cache_dtype: numpy's name of the dtype of the caches.
    """
    # A tied lm_head is the embedding.
    lengths = {(tensor.location, tensor.offset): tensor.length for tensor in external_tensors(model)}
    weights = sum(lengths.values())
    held = weights + max(lengths.values()) + _LIBRARY_BYTES
    sizes = {"B": batch, "C": capacity}
    caches = sum(
        math.prod(sizes[dim] if isinstance(dim, str) else dim for dim in cache.shape)
        for cache in bundle.manifest.contract.caches()
    )
    layers = bundle.manifest.contract.num_hidden_layers
    return Estimate(
        weight_bytes=weights,
        plan_bytes=weights + _KERNEL_BYTES,
        peak_bytes=weights + held,
        held_bytes=held,
        gpu_bytes=weights + caches * numpy_dtype(cache_dtype).itemsize,
        seconds=_SECONDS_PER_GB * weights / 1e9 + _SECONDS_PER_LAYER * layers,
    )


def check_resources(needed: Estimate, folder: Path) -> None:
    """Checks that the plan fits onto the disk of `folder`, and its build into this machine's memory.

    Raises:
        ResourceError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if needed.plan_bytes > free:
        raise ResourceError(
            f"The engine needs about {needed.plan_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; free "
            "some space."
        )
    available = available_bytes()
    if available is not None and needed.held_bytes > available:
        raise ResourceError(
            f"Building the engine needs about {needed.held_bytes / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB "
            "are available; free some, or build on a larger machine."
        )


def available_bytes() -> int | None:
    """Memory that this process can still have: the machine's and its control group's; None where nobody says."""
    limits = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(table["MemAvailable"].split()[0]) << 10)
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
        limits.append(int((group / "memory.max").read_text()) - int(held))
    return min(limits, default=None)


class PeakMemory:
    """The most memory that this process has held since this was made."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # then it counts from the start of the process
            Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        """The resident set at its largest, pages of files included."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise OSError("/proc/self/status has no VmHWM")
