"""Opens a TensorRT or TensorRT-RTX engine of a bundle: everything that is checked before a plan is deserialized.

A plan is native code to the library that loads it. So first everything cheap that engine.json and the manifest say,
then the plan's hash, then the GPU; only then the library sees a byte of it. Code for the host is never allowed in one.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_export.plugins.library import cuda_library
from glm_export.plugins.ops import TENSORRT_PLUGINS
from glm_export.runtime import cuda
from glm_export.runtime.bundle import MODEL_NAME, Bundle
from glm_export.runtime.contract import Binding, Contract
from glm_export.runtime.engine_info import PLAN_NAME, EngineInfo, engine_path
from glm_export.runtime.errors import BackendError, GlmExportError, IntegrityError, ResourceError
from glm_export.runtime.tensorrt_library import Library, load_library

DECODE, PREFILL = 0, 1
"""The optimization profiles: one new token per row, and up to EngineInfo.prefill of them."""

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3fn": "FP8", "int64": "INT64"}
"""numpy's name of a dtype -> the library's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A deserialized engine that is what the bundle says."""

    info: EngineInfo
    library: Library
    plan: Any
    """The ICudaEngine."""
    runtime: Any
    """The IRuntime that `plan` came from."""

    def failure(self, what: str) -> GlmExportError:
        """The error to raise after a call of the library failed, with what the library reported."""
        return library_failure(self.library, what)


def open_engine(bundle: Bundle, info: EngineInfo, *, cache_bytes: int = 0) -> Engine:
    """Deserializes the plan of a bundle's engine, if it may and can run here.

    Args:
        bundle: an opened bundle.
        info: `EngineInfo.read` of it.
        cache_bytes: GPU memory that the caller will need beside the weights.

    Raises:
        BackendError: the library is not installed or of another version than the one that built the plan; there is no
            GPU, or one that the engine is not for; the plugins' kernels are missing; or the library can not load the
            plan.
        IntegrityError: the plan is not the one that was built, was built from another model.onnx, or its inputs and
            outputs are not those of the contract.
        ResourceError: the GPU has not enough memory.
    """
    if info.graph_sha256 != bundle.manifest.files[MODEL_NAME].sha256:
        raise IntegrityError(
            f"The {info.target} engine of {bundle.directory} was built from another {MODEL_NAME}: {_rebuild(info)}."
        )
    library = load_library(info.target)
    if library.version != info.library_version:
        raise BackendError(
            f"The engine was built with {info.target} {info.library_version} and the installed version is "
            f"{library.version}: install {info.library_version}, or {_rebuild(info)}."
        )
    path = bundle.file(engine_path(info.target, PLAN_NAME))
    _check_gpu(info, cache_bytes)
    _check_kernels(info)
    runtime = library.module.Runtime(library.logger)
    plan = _deserialize(library, runtime, path)
    engine = Engine(info=info, library=library, plan=plan, runtime=runtime)
    _check_tensors(engine, bundle.manifest.contract)
    return engine


def library_failure(library: Library, what: str) -> GlmExportError:
    """The error to raise after a call of the library failed, with what the library reported."""
    reason = " ".join(" ".join(library.logger.take_errors()).split())[:400] or "it gave no reason"
    name = f"{library.target} {library.version}"
    if "out of memory" in reason.lower() or "outofmemory" in reason.lower():
        return ResourceError(
            f"{name} ran out of GPU memory when it {what} ({reason}): use fewer rows, or end what else uses the GPU."
        )
    return BackendError(f"{name} failed when it {what} ({reason}): run `glm-export verify`, or build the engine again.")


def _rebuild(info: EngineInfo) -> str:
    return f"build it again with `glm-export engine BUNDLE --target {info.target} --replace`"


def _check_gpu(info: EngineInfo, cache_bytes: int) -> None:
    gpu = cuda.gpu(info.target)
    if gpu.compute_capability not in info.compute_capabilities:
        raise BackendError(
            f"The engine is for GPUs of compute capability {', '.join(info.compute_capabilities)}, and the "
            f"{gpu.name} has {gpu.compute_capability}: {_rebuild(info)} for it."
        )
    free, needed = cuda.free_bytes(), info.plan_bytes + cache_bytes
    if needed > free:
        raise ResourceError(
            f"The engine needs {needed / 2**30:.1f} GiB of GPU memory ({info.plan_bytes / 2**30:.1f} for weights, "
            f"{cache_bytes / 2**30:.1f} for KV caches), and the {gpu.name} has {free / 2**30:.1f} GiB free: use fewer "
            "rows, end what else uses the GPU, or build an engine of smaller capacity."
        )


def _check_kernels(info: EngineInfo) -> None:
    plugins = sorted(name for name in TENSORRT_PLUGINS if info.layers.get(name))
    if plugins and cuda_library() is None:
        raise BackendError(
            f"The engine needs the plugins {', '.join(plugins)}, and glm-export was installed without their CUDA "
            "kernels: install it again where nvcc is on the path."
        )


def _deserialize(library: Library, runtime: Any, path: Path) -> Any:
    library.logger.take_errors()  # what somebody else left there would be taken for ours
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        plan = runtime.deserialize_cuda_engine(mapped)
    if plan is None:
        raise library_failure(library, f"loaded {path}")
    return plan


def _check_tensors(engine: Engine, contract: Contract) -> None:
    """Raises IntegrityError unless names, dtypes, shapes, profiles and shared buffers are those of the contract."""
    info, plan = engine.info, engine.plan
    mode = engine.library.module.TensorIOMode
    names = {plan.get_tensor_name(i) for i in range(plan.num_io_tensors)}
    expected = {
        binding.name: (binding, kind)
        for kind, bindings in ((mode.INPUT, contract.inputs()), (mode.OUTPUT, contract.outputs_of_step()))
        for binding in bindings
    }
    problems = [f"{name} is not expected" for name in sorted(names - expected.keys())]
    problems += [f"{name} is missing" for name in expected if name not in names]
    if info.compute_dtype != contract.compute_dtype:
        problems.append(f"it computes in {info.compute_dtype}, not {contract.compute_dtype}")
    if plan.num_optimization_profiles != PREFILL + 1:
        problems.append(f"it has {plan.num_optimization_profiles} optimization profiles, not {PREFILL + 1}")
    if not problems:
        for binding, kind in expected.values():
            problems += _tensor_problems(engine, binding, kind)
    if problems:
        raise IntegrityError(
            f"The {info.target} engine is not the one that engine.json and the manifest's contract describe "
            f"({problems[0]}): {_rebuild(info)}."
        )


def _tensor_problems(engine: Engine, binding: Binding, kind: Any) -> Iterator[str]:
    info, plan, module, name = engine.info, engine.plan, engine.library.module, binding.name
    is_cache = name.startswith(("k_cache", "v_cache"))
    dtype = info.cache_dtype if is_cache else binding.dtype
    if plan.get_tensor_mode(name) != kind:
        yield f"{name} is an output in place of an input, or the reverse"
        return
    if plan.get_tensor_dtype(name) != getattr(module.DataType, _TYPES[dtype]):
        yield f"{name} is {plan.get_tensor_dtype(name)}, not {dtype}"
    if plan.get_tensor_location(name) != module.TensorLocation.DEVICE:
        yield f"{name} lies in host memory"
    largest = {"B": info.batch, "S": info.prefill, "T": info.batch * info.prefill, "C": info.capacity}
    seen = tuple(plan.get_tensor_shape(name))
    if len(seen) != len(binding.shape) or not all(map(_fits, seen, binding.shape, [largest] * len(seen))):
        yield f"{name} has shape {list(seen)}, expected [{','.join(map(str, binding.shape))}]"
    if binding.in_place_of is None:
        if kind == module.TensorIOMode.INPUT:
            yield from _profile_problems(plan, binding, info)
        return
    alias = plan.get_aliased_input_tensor(name)
    # The library names the pairs of its own KV-cache layer; an FP8 cache is written by our plugin.
    if alias != binding.in_place_of and not (alias is None and info.cache_dtype == "float8_e4m3fn"):
        yield f"{name} shares its buffer with {alias}, not with {binding.in_place_of}"


def _fits(seen: int, dim: int | str, largest: dict[str, int]) -> bool:
    """Whether a dimension is the expected number, or free where that is (a free one that can only be 1 may be 1)."""
    if isinstance(dim, int) or dim == "C":
        return seen == (largest["C"] if dim == "C" else dim)
    return seen == -1 or (seen == 1 and largest[dim] == 1)


def _profile_problems(plan: Any, binding: Binding, info: EngineInfo) -> Iterator[str]:
    for profile, longest in ((DECODE, 1), (PREFILL, info.prefill)):
        low, _, high = plan.get_tensor_profile_shape(binding.name, profile)
        for letter, dim, least, most in zip(binding.shape, range(len(binding.shape)), low, high, strict=True):
            wanted = {"B": info.batch, "S": longest}.get(str(letter))
            if wanted is not None and (least > 1 or most != wanted):
                yield f"dimension {dim} of {binding.name} is {least}..{most} in profile {profile}, expected 1..{wanted}"
