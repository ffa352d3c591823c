"""Opens a session on a bundle: the only place that knows which targets exist."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import BackendError, UsageError
from glm_export.runtime.session import Session


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a target's session lives and what it needs."""

    module: str
    session: str
    library: str
    extra: str


TARGETS = {
    "onnxruntime": Target(
        module="glm_export.runtime.ort_session", session="OnnxRuntimeSession", library="onnxruntime", extra="cpu"
    ),
}


def open_session(
    bundle: Bundle,
    *,
    target: str = "onnxruntime",
    batch: int | None = None,
    capacity: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Session:
    """Opens a bundle for decoding.

    Args:
        bundle: an opened bundle.
        target: which engine to run, a key of TARGETS.
        batch: rows; the bundle's default when None.
        capacity: tokens per row; the bundle's default when None.
        threads: CPU threads; the library's choice when None.
        device: `cpu` or `cuda`.

    Raises:
        UsageError: there is no such target or device, batch, capacity or threads is out of range, or GLM_EXPORT_CPU
            asks for kernels that this machine can not run.
        BackendError: the target's library is not installed, or lacks the device or an operator.
        InputError: the bundle has no weights.
        IntegrityError: the engine and the manifest disagree, or the engine does not load.
        ResourceError: the caches do not fit into memory.
    """
    if target not in TARGETS:
        close = difflib.get_close_matches(target, TARGETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(TARGETS)}."
        raise UsageError(f"There is no target {target!r}: {hint}")
    chosen = TARGETS[target]
    if importlib.util.find_spec(chosen.library) is None:
        raise BackendError(
            f'The target {target} needs the library {chosen.library}: pip install "glm-export[{chosen.extra}]".'
        )
    session: Callable[..., Session] = getattr(importlib.import_module(chosen.module), chosen.session)
    return session(bundle, batch=batch, capacity=capacity, threads=threads, device=device)
