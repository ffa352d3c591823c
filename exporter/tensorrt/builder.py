"""A bundle + the choices of [engine] -> an engine in it: lower, parse, check, build, and enter it into the manifest.

Everything happens in `engines/<target>.building`, which gets its final name when it is complete; until then the bundle
is as it was, with the engine it had before.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from glm_export.exporter.progress import Reporter
from glm_export.exporter.recipe import Engine
from glm_export.exporter.staging import only_builder
from glm_export.exporter.tensorrt.check import check_network
from glm_export.exporter.tensorrt.estimate import (
    FP8_CACHE,
    Machine,
    PeakMemory,
    check_machine,
    check_resources,
    estimate,
)
from glm_export.exporter.tensorrt.layers import Layers, read_layers
from glm_export.exporter.tensorrt.lower import lower
from glm_export.exporter.tensorrt.network import Network, parse_network
from glm_export.exporter.tensorrt.plan import PlanOptions, build_plan
from glm_export.plugins.external_data import external_tensors
from glm_export.plugins.library import cuda_library
from glm_export.runtime.bundle import BUILDING, MODEL_NAME, Bundle
from glm_export.runtime.engine_info import ENGINE_NAME, PLAN_NAME, EngineInfo, engine_path
from glm_export.runtime.errors import UsageError
from glm_export.runtime.files import FileRecord, sha256_of, sync_directory
from glm_export.runtime.manifest import Manifest
from glm_export.runtime.tensorrt_library import Library

TIMING_CACHE = "timing.cache"
_FUSED_CAPACITY = 28544
"""The largest C for which TensorRT-RTX has fused attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineChoices:
    """What an engine of a bundle is to be."""

    target: str
    batch: int
    """Most rows."""
    capacity: int
    """Tokens per row, exactly."""
    engine: Engine

    @property
    def prefill(self) -> int:
        """Most new tokens per row in one step: no more than the cache holds."""
        return min(self.engine.prefill, self.capacity)


def build_engine(
    bundle: Bundle, choices: EngineChoices, reporter: Reporter, *, replaces: bool = False, hashed: bool = False
) -> Manifest:
    """Adds an engine to a bundle.

    Args:
        bundle: an opened bundle.
        choices: what to build.
        reporter: where progress goes.
        replaces: whether an engine that is there for this target may go; it does when the new one is complete.
        hashed: whether the weights were hashed or written just now. Otherwise they are hashed first, because nobody can
            tell from a plan that a weight was damaged.

    Returns:
        The manifest with the engine.

    Raises:
        UsageError: there is such an engine already, or the choices do not fit the bundle.
        InputError: the bundle has no weights.
        IntegrityError: a weight is not what the manifest says.
        BackendError: library, GPU or plugins are missing, or the library does not build it.
        ResourceError: disk or memory is too small.
        LockedError: another process builds here.
    """
    bundle.require_weights()
    with only_builder(bundle.directory):
        bundle = Bundle.open(bundle.directory, check="size")  # as it is now that nobody else changes it
        if choices.target in bundle.manifest.engines and not replaces:
            raise UsageError(f"{bundle.directory} has an engine for {choices.target}: --replace builds a new one.")
        _check_capacity(bundle, choices)
        machine = check_machine(choices.target, bundle.manifest.precision, choices.engine)
        model = onnx.load(bundle.file(MODEL_NAME), load_external_data=False)
        _check_resources(bundle, model, choices, machine, reporter)
        if not hashed:
            _hash_weights(bundle, model, reporter)
        staging = bundle.directory / engine_path(choices.target + BUILDING, "")
        shutil.rmtree(staging, ignore_errors=True)  # of a killed build
        staging.mkdir(parents=True)
        try:
            info, records = _build(bundle, model, choices, machine, staging, reporter)
            reporter.note(
                f"engine: {info.plan_bytes / 1e9:.2f} GB in {info.build_seconds:.0f} s, at most "
                f"{info.build_peak_bytes / 1e9:.1f} GB of memory"
            )
            return _enter(bundle, choices.target, staging, records, machine.library)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):  # another engine is there
                staging.parent.rmdir()


def lowered_network(
    library: Library, bundle: Bundle, model: onnx.ModelProto, choices: EngineChoices
) -> tuple[Network, Layers, dict[str, int]]:
    """Lowers a bundle's graph, parses it and checks that everything is there; also returns the counts of layers.

    Raises:
        UsageError: the graph can not be lowered.
        BackendError: the library does not take it, or not as it must be.
    """
    network = parse_network(library, lowered_model(bundle, model, choices), bundle)
    layers = read_layers(network)
    counts = check_network(
        layers,
        bundle.manifest.contract,
        fp8_weights=_fp8_matrices(model),
        cache_dtype=cache_dtype(bundle, choices.engine),
        experts=choices.engine.experts,
    )
    return network, layers, counts


def lowered_model(bundle: Bundle, model: onnx.ModelProto, choices: EngineChoices) -> onnx.ModelProto:
    """The graph that TensorRT's parser is given."""
    compute_dtype = bundle.manifest.contract.compute_dtype
    return lower(
        model,
        compute_dtype=compute_dtype,
        capacity=choices.capacity,
        cache_dtype=choices.engine.cache_dtype,
        experts=choices.engine.experts,
        decompose_attention=compute_dtype == "float32" or choices.capacity > _FUSED_CAPACITY,
    )


def cache_dtype(bundle: Bundle, engine: Engine) -> str:
    """The dtype of an engine's KV caches, by numpy's name."""
    return FP8_CACHE if engine.cache_dtype == "fp8" else bundle.manifest.contract.compute_dtype


def _hash_weights(bundle: Bundle, model: onnx.ModelProto, reporter: Reporter) -> None:
    paths = sorted({tensor.location for tensor in external_tensors(model)})
    total = sum(bundle.file(path, hashed=False).stat().st_size for path in paths)
    with reporter.stage("hashing the weights", total) as advance:
        for path in paths:
            bundle.file(path, progress=advance)


def _check_capacity(bundle: Bundle, choices: EngineChoices) -> None:
    positions = bundle.manifest.max_position_embeddings
    if choices.capacity > positions:
        raise UsageError(f"capacity {choices.capacity} is more than the model's {positions} positions: choose less.")


def _check_resources(
    bundle: Bundle, model: onnx.ModelProto, choices: EngineChoices, machine: Machine, reporter: Reporter
) -> None:
    """Says what the engine will take, and refuses where that is too much."""
    needed = estimate(
        bundle, model, batch=choices.batch, capacity=choices.capacity, cache_dtype=cache_dtype(bundle, choices.engine)
    )
    check_resources(needed, bundle.directory)
    gpus = machine.gpu or f"compute capability {' and '.join(machine.compute_capabilities)}"
    reporter.note(
        f"building for {choices.target}, {gpus}: about {needed.plan_bytes / 1e9:.2f} GB of disk, "
        f"{needed.peak_bytes / 1e9:.1f} GB of memory, {needed.seconds:.0f} s; to run, "
        f"{needed.gpu_bytes / 1e9:.2f} GB of GPU memory for weights and KV cache"
    )
    if cuda_library() is None:
        reporter.note("glm-export was installed without nvcc, so without CUDA kernels: this engine can not run")


def _build(
    bundle: Bundle, model: onnx.ModelProto, choices: EngineChoices, machine: Machine, staging: Path, reporter: Reporter
) -> tuple[EngineInfo, dict[str, FileRecord]]:
    """Builds the engine's files into `staging`; their records have their final paths."""
    started, peak, target = time.monotonic(), PeakMemory(), choices.target
    with reporter.stage("parsing the network"):
        network, _, counts = lowered_network(machine.library, bundle, model, choices)
    timing_cache = None if machine.library.is_rtx else staging / TIMING_CACHE  # RTX measures nothing when it builds
    known = engine_path(target, TIMING_CACHE)
    if timing_cache and known in bundle.manifest.files:
        shutil.copyfile(bundle.file(known), timing_cache)
    plan = build_plan(
        network,
        bundle.manifest.contract,
        staging / PLAN_NAME,
        PlanOptions(
            batch=choices.batch,
            capacity=choices.capacity,
            prefill=choices.prefill,
            compute_capabilities=machine.compute_capabilities,
            in_place_plugins="FP8CacheWrite" in counts,
            timing_cache=timing_cache,
        ),
        reporter,
    )
    info = EngineInfo(
        target=target,
        library_version=machine.library.version,
        compute_capabilities=machine.compute_capabilities,
        gpu=machine.gpu,
        compute_dtype=bundle.manifest.contract.compute_dtype,
        cache_dtype=cache_dtype(bundle, choices.engine),
        capacity=choices.capacity,
        batch=choices.batch,
        prefill=choices.prefill,
        graph_sha256=bundle.manifest.files[MODEL_NAME].sha256,
        plan_bytes=plan.size,
        layers=counts,
        build_seconds=round(time.monotonic() - started, 3),
        build_peak_bytes=peak.bytes,
    )
    records = {PLAN_NAME: plan, ENGINE_NAME: info.write(staging)}
    if timing_cache:
        records[TIMING_CACHE] = FileRecord(size=timing_cache.stat().st_size, sha256=sha256_of(timing_cache))
    return info, {engine_path(target, name): record for name, record in records.items()}


def _enter(bundle: Bundle, target: str, staging: Path, records: dict[str, FileRecord], library: Library) -> Manifest:
    """Gives the engine its name and enters it into the manifest, after the one it replaces has left both.

    A crash in between leaves a bundle without an engine for the target, and never one with half of each.
    """
    final = staging.with_name(target)
    manifest = bundle.manifest
    old = set(manifest.engines.get(target, ()))
    without = replace(
        manifest,
        files={path: record for path, record in manifest.files.items() if path not in old},
        engines={name: paths for name, paths in manifest.engines.items() if name != target},
    )
    if old:
        without.write(bundle.directory)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    sync_directory(final.parent)
    result = replace(
        without,
        files=dict(sorted([*without.files.items(), *records.items()])),
        engines={**without.engines, target: tuple(records)},
        versions={**without.versions, target: library.version},
    )
    result.write(bundle.directory)
    return result


def _fp8_matrices(model: onnx.ModelProto) -> list[str]:
    """The weights of linear layers in FP8; the experts' have three dimensions and belong to their plugin."""
    fp8 = onnx.TensorProto.FLOAT8E4M3FN
    return [tensor.name for tensor in model.graph.initializer if tensor.data_type == fp8 and len(tensor.dims) == 2]
