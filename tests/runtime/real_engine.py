"""The toy as a real engine, and whether this machine can run one."""

from __future__ import annotations

import functools
import importlib.util
import time
from pathlib import Path

import toy
from toy import record_engine

from glm_export.runtime import cuda
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import PLAN_NAME, EngineInfo, engine_path
from glm_export.runtime.errors import BackendError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
RTX_CAPABILITIES = ("8.6", "8.9", "12.0")


@functools.cache
def missing(target: str, *, running: bool = True) -> str:
    """Why engines of this target can not be built, or run, here; empty if they can."""
    if importlib.util.find_spec(MODULES[target]) is None:
        return f"the library {MODULES[target]} is not installed"
    if not running:
        return ""
    try:
        gpu = cuda.gpu()
    except BackendError as error:
        return str(error)
    if target == "tensorrt-rtx" and gpu.compute_capability not in RTX_CAPABILITIES:
        return f"TensorRT-RTX has no engines for compute capability {gpu.compute_capability}"
    return ""


def write_real_engine(
    directory: Path,
    target: str,
    *,
    compute_capabilities: tuple[str, ...],
    capacity: int = 32,
    batch: int = 4,
    prefill: int = 16,
) -> EngineInfo:
    """Builds the toy for a target and adds it to a toy bundle."""
    from glm_export.exporter.progress import Reporter
    from glm_export.exporter.tensorrt.network import parse_network
    from glm_export.exporter.tensorrt.plan import PlanOptions, build_plan
    from glm_export.runtime.tensorrt_library import load_library

    bundle = Bundle.open(directory)
    contract = bundle.manifest.contract
    folder = directory / engine_path(target, "")
    folder.mkdir(parents=True)
    library = load_library(target)
    network = parse_network(library, toy.graph(contract, capacity=capacity, tensorrt=True), bundle)
    prefill = min(prefill, capacity)
    options = PlanOptions(
        batch=batch,
        capacity=capacity,
        prefill=prefill,
        compute_capabilities=compute_capabilities,
        in_place_plugins=False,
        timing_cache=None,
    )
    started = time.monotonic()
    plan = build_plan(network, contract, folder / PLAN_NAME, options, Reporter(quiet=True))
    info = EngineInfo(
        target=target,
        library_version=library.version,
        compute_capabilities=compute_capabilities,
        gpu=None,
        compute_dtype=contract.compute_dtype,
        cache_dtype=contract.compute_dtype,
        capacity=capacity,
        batch=batch,
        prefill=prefill,
        graph_sha256=bundle.manifest.files["model.onnx"].sha256,
        plan_bytes=plan.size,
        layers={},
        build_seconds=time.monotonic() - started,
        build_peak_bytes=1,
    )
    info.write(folder)
    record_engine(directory, target)
    return info
