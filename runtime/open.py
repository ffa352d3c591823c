"""Opens a session on a bundle: the only place that knows which targets exist."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import ENGINE_TARGETS, EngineInfo
from glm_export.runtime.errors import UsageError
from glm_export.runtime.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a target's session lives. Its module is imported when one is opened, and says if a library is missing."""

    module: str
    session: str


TARGETS = {
    "onnxruntime": Target(module="glm_export.runtime.ort_session", session="OnnxRuntimeSession"),
    "tensorrt": Target(module="glm_export.runtime.trt_session", session="TensorRtSession"),
    "tensorrt-rtx": Target(module="glm_export.runtime.trt_session", session="TensorRtRtxSession"),
}


def default_batch(bundle: Bundle, target: str) -> int:
    """The rows of a session that is asked for none: the bundle's number, or fewer if the target's engine takes fewer.

    Raises:
        InputError: the bundle has no engine for the target.
        IntegrityError: engine.json is damaged.
    """
    if target not in ENGINE_TARGETS:
        return bundle.manifest.batch
    return min(bundle.manifest.batch, EngineInfo.read(bundle, target).batch)


def open_session(
    bundle: Bundle,
    *,
    target: str = "onnxruntime",
    batch: int | None = None,
    capacity: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    cache_dtype: str | None = None,
) -> Session:
    """Opens a bundle for decoding.

    Args:
        bundle: an opened bundle.
        target: which engine to run, a key of TARGETS.
        batch: rows; the bundle's default when None, or fewer if a TensorRT engine takes no more.
        capacity: tokens per row; the bundle's default when None. A TensorRT engine has one of its own.
        threads: CPU threads, of onnxruntime; its choice when None.
        device: `cpu` or `cuda`; when None, cpu for onnxruntime and cuda for the others.
        cache_dtype: `float32` or `bfloat16`, to which keys and values are rounded when they are cached; the compute
            dtype when None. A TensorRT engine has one of its own.

    Raises:
        UsageError: there is no such target, device or cache dtype, batch, capacity or threads is out of range, or
            GLM_EXPORT_CPU asks for kernels that this machine can not run.
        BackendError: the target's library is not installed, is not the one of the engine, or lacks the device or an
            operator.
        InputError: the bundle has no weights, or no engine for the target.
        IntegrityError: the engine and the manifest disagree, or the engine does not load.
        ResourceError: weights or caches do not fit into memory.
    """
    if target not in TARGETS:
        close = difflib.get_close_matches(target, TARGETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(TARGETS)}."
        raise UsageError(f"There is no target {target!r}: {hint}")
    chosen = TARGETS[target]
    session: Callable[..., Session] = getattr(importlib.import_module(chosen.module), chosen.session)
    return session(bundle, batch=batch, capacity=capacity, threads=threads, device=device, cache_dtype=cache_dtype)
