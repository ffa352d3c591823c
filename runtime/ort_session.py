"""Target onnxruntime: the bundle's graph in ONNX Runtime, with KV caches that are updated in place.

Each `k_cache.{i}` and its `k_cache_out.{i}` are bound to one address, so TensorScatter writes the new tokens and copies
nothing. Bindings and buffers are made once per S; a decode step only fills in its tokens and runs.

On a CPU, ops of the `glm` domain run as our kernels: ONNX Runtime takes a registered kernel in preference to the
function body of the same name. `GLM_EXPORT_CPU` forces an instruction set, or leaves the kernels out (`portable`). For
the kernels the graph is opened with what belongs together fused (plugins/fusion.py); no number changes by that.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_export.plugins.finite import finite_logits
from glm_export.plugins.library import Kernels, cpu_kernels, cpu_library, wants_kernels
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.contract import CACHE_DTYPES, Binding
from glm_export.runtime.errors import BackendError, IntegrityError, ResourceError, UsageError, missing_library
from glm_export.runtime.session import Array, Floats, Ints, Session, StepOutput, numpy_dtype
from glm_export.runtime.weights import mapped_weights

LOG_SEVERITY = 3
"""ONNX Runtime's level for errors."""

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
_ORT_TYPES = {"float32": "float", "int64": "int64", "float16": "float16", "bfloat16": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A binding for one S and the host buffers behind it."""

    io: Any
    tokens: Array
    output: StepOutput
    logits_address: int


class OnnxRuntimeSession(Session):
    """A bundle's model.onnx in ONNX Runtime."""

    kernels: Kernels | None
    """The ops that run as our kernels; None if all run as their function bodies."""

    cache_dtype: str
    """Of the KV caches."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        batch: int | None = None,
        capacity: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        cache_dtype: str | None = None,
    ) -> None:
        """Loads the graph and zero-fills the caches; arguments and errors as `open_session` says."""
        super().__init__(bundle, batch=batch, capacity=capacity)
        if importlib.util.find_spec("onnxruntime") is None:
            raise missing_library("The target onnxruntime", "onnxruntime", extra="cpu")
        device = device or "cpu"
        _check_device(device)
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}: it must be 1 or more.")
        self.cache_dtype = cache_dtype or self.contract.compute_dtype
        if self.cache_dtype not in (self.contract.compute_dtype, *CACHE_DTYPES):
            raise UsageError(f"There is no cache dtype {cache_dtype!r}: choose one of {', '.join(CACHE_DTYPES)}.")
        self._device = device
        self._caches = self._zero_caches()
        self._ort, self.kernels, self._weights = _load(
            bundle, threads=threads, device=device, cache_dtype=self.cache_dtype
        )
        _check_bindings(self._ort.get_inputs(), self.contract.inputs(self.cache_dtype), "inputs")
        _check_bindings(self._ort.get_outputs(), self.contract.outputs_of_step(self.cache_dtype), "outputs")
        self._steps: dict[int, _Step] = {}
        self._finite_address = finite_logits(cpu_library() if self.kernels else None)
        self._found_finite = False

    def cache(self, name: str) -> Array:
        """The KV cache `k_cache.{i}` or `v_cache.{i}`, [B,J,C,A]: a view on the CPU, a copy from a CUDA device."""
        host, device_value = self._caches[name]
        if self._device == "cpu":
            return host
        copy: Array = device_value.numpy().view(host.dtype)
        return copy

    def _execute(self, tokens: Array, write_index_B: Ints, length_B: Ints) -> StepOutput:
        try:
            # The array for the next tokens is bound itself.
            new = 1 if tokens is self._next else tokens.shape[1]
            step = self._steps.get(new) or self._bind(new, write_index_B, length_B)
            if tokens is not step.tokens:
                step.tokens[...] = tokens
            self._finite_address[0] = 0
            started = time.perf_counter()
            self._ort.run_with_iobinding(step.io)
            self.engine_seconds = time.perf_counter() - started
            self._found_finite = self._finite_address[0] == step.logits_address
        except Exception as error:
            if isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error):
                raise ResourceError(
                    f"ONNX Runtime ran out of memory in a step of {self.batch} rows, {tokens.shape[1]} new tokens and "
                    f"capacity {self.capacity}: use fewer rows, a smaller prefill chunk or a smaller capacity."
                ) from error
            raise
        output = step.output
        if output.extras:
            extras = {name: array.copy() for name, array in output.extras.items()}
            return StepOutput(logits=output.logits, extras=extras)
        return output

    def _all_finite(self, logits: Floats) -> bool:
        return self._found_finite or super()._all_finite(logits)

    def _bind(self, new: int, write_index_B: Ints, length_B: Ints) -> _Step:
        """Binds every input and output for S = `new` and remembers the binding."""
        # Decoding (S = 1) alternates with chunks of one other size: those two are worth keeping.
        self._steps = {size: step for size, step in self._steps.items() if size == 1}
        io = self._ort.io_binding()
        tokens, _, _, *caches = self.contract.inputs(self.cache_dtype)
        dims = {"B": self.batch, "S": new, "T": self.batch * new, "C": self.capacity}
        is_next = new == 1 and not self.contract.inputs_embeds
        token_buffer = self._next if is_next else np.empty(_shape(tokens, dims), numpy_dtype(tokens.dtype))
        self._bind_input(io, tokens.name, token_buffer)
        self._bind_input(io, "write_index", write_index_B)
        self._bind_input(io, "length", length_B)
        for cache in caches:
            host, value = self._caches[cache.name]
            io.bind_input(cache.name, self._device, 0, _ONNX_TYPES[cache.dtype], host.shape, value.data_ptr())
        outputs: dict[str, Array] = {}
        for binding in self.contract.outputs_of_step(self.cache_dtype):
            kind = _ONNX_TYPES[binding.dtype]
            if binding.in_place_of is not None:
                host, value = self._caches[binding.in_place_of]
                io.bind_output(binding.name, self._device, 0, kind, host.shape, value.data_ptr())
            else:
                buffer = outputs[binding.name] = np.empty(_shape(binding, dims), numpy_dtype(binding.dtype))
                io.bind_output(binding.name, "cpu", 0, kind, buffer.shape, buffer.ctypes.data)
        logits = outputs.pop("logits")
        output, address = StepOutput(logits=logits, extras=outputs), logits.ctypes.data
        step = self._steps[new] = _Step(io=io, tokens=token_buffer, output=output, logits_address=address)
        return step

    def _bind_input(self, io: Any, name: str, buffer: Array) -> None:
        io.bind_input(name, "cpu", 0, _ONNX_TYPES[buffer.dtype.name], buffer.shape, buffer.ctypes.data)

    def _zero_caches(self) -> dict[str, tuple[Array, Any]]:
        """For every cache its host array and the ONNX Runtime value that owns (CUDA) or refers to (CPU) the memory."""
        from onnxruntime import OrtValue

        bindings = self.contract.caches(self.cache_dtype)
        shape = _shape(bindings[0], {"B": self.batch, "C": self.capacity})
        dtype = numpy_dtype(self.cache_dtype)
        size = math.prod(shape) * dtype.itemsize * len(bindings)
        too_big = ResourceError(
            f"The KV caches for {self.batch} rows of {self.capacity} tokens need {size / 2**30:.1f} GiB, more than "
            "there is: use fewer rows or a smaller capacity."
        )
        if self._device == "cpu" and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise too_big
        caches = {}
        try:
            # One array for all of them: numpy asks for large pages where it allocates much at once.
            for binding, host in zip(bindings, np.zeros((len(bindings), *shape), dtype), strict=True):
                # ONNX Runtime knows no numpy bfloat16: it is given the bits here, and the type where they are bound.
                bits = host.view(f"u{host.itemsize}")
                caches[binding.name] = (host, OrtValue.ortvalue_from_numpy(bits, self._device, 0))
        except MemoryError:
            raise too_big from None
        return caches

    def _clear(self, length_B: Ints) -> None:
        for host, value in self._caches.values():
            if self._device != "cpu":
                host[...] = value.numpy().view(host.dtype)
            for row, length in enumerate(length_B.tolist()):
                host[row, :, length:] = 0
            if self._device != "cpu":
                value.update_inplace(host.view(f"u{host.itemsize}"))

    def _close(self) -> None:
        self._steps.clear()
        self._caches.clear()
        self._ort = None
        self._weights.clear()  # after what reads them


def _check_device(device: str) -> None:
    import onnxruntime as ort

    if device not in _PROVIDERS:
        raise UsageError(f"There is no device {device!r}: choose one of {', '.join(_PROVIDERS)}.")
    if _PROVIDERS[device] not in ort.get_available_providers():
        raise BackendError(
            f'The installed onnxruntime has no {device} support: pip install "glm-export[{device}]" in its place.'
        )


def _load(
    bundle: Bundle, *, threads: int | None, device: str, cache_dtype: str
) -> tuple[Any, Kernels | None, list[object]]:
    """The graph in ONNX Runtime, the kernels it runs, and what it refers to and has to be kept as long."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.intra_op_num_threads = threads or 0
    if device == "cpu":
        # The arena keeps the largest step's activations for good, rounded up, and plans them once per S. The system's
        # allocator is as fast and gives back what a prefill took.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    kernels = _register_kernels(options) if device == "cpu" else None
    providers = [_PROVIDERS[device]] + (["CPUExecutionProvider"] if device != "cpu" else [])
    try:
        model: str | bytes = str(bundle.model_path)
        changed = _changed_graph(bundle, kernels, cache_dtype)
        if changed is not None:
            model = changed
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(bundle.model_path.parent))
        weights = [] if kernels is None or changed is None else _give_weights(options, changed, bundle)
        # Constant folding would dequantize the weights into a second, larger copy.
        session = ort.InferenceSession(model, options, providers=providers, disabled_optimizers=["ConstantFolding"])
        return session, kernels, weights
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if type(error).__name__ == "NotImplemented":
            raise BackendError(
                f"onnxruntime {ort.__version__} has no kernel that {bundle.model_path} needs ({reason}): install a "
                "newer one."
            ) from error
        raise IntegrityError(
            f"onnxruntime {ort.__version__} can not load {bundle.model_path} ({reason}): run `glm-export verify`, "
            "or build the bundle again."
        ) from error


def _changed_graph(bundle: Bundle, kernels: Kernels | None, cache_dtype: str) -> bytes | None:
    """The bundle's model.onnx with other caches, and with the kernels' fused ops; None if it is to be as it is."""
    contract = bundle.manifest.contract
    other_caches = cache_dtype != contract.compute_dtype
    if kernels is None and not other_caches:
        return None
    # Only for the kernels and for other caches the runtime needs onnx, through modules of the plugins.
    from glm_export.plugins.cached_attention.cache_dtype import with_cache_dtype
    from glm_export.plugins.fusion import fused

    graph = bundle.model_path.read_bytes()
    if other_caches:
        outputs = (binding for binding in contract.outputs_of_step() if binding.in_place_of)
        names = {binding.name for binding in (*contract.caches(), *outputs)}
        graph = with_cache_dtype(graph, names, cache_dtype)
    return graph if kernels is None else fused(graph, kernels.ops)


def _give_weights(options: Any, graph: bytes, bundle: Bundle) -> list[object]:
    """Gives ONNX Runtime the weights where they are mapped, file by file; returns what to keep as long as the session.

    Left to itself it maps each tensor apart, and a large page that holds the end of one and the start of the next
    serves neither. It may still copy what its own kernels want in another order, but no input of ours.
    """
    from onnxruntime import OrtValue

    from glm_export.plugins.external_data import external_tensors

    weights: list[object] = []
    for tensor, data in mapped_weights(external_tensors(graph), bundle):
        bits = data.view(f"u{tensor.itemsize}").reshape(tensor.shape)  # as with the caches, whatever the type
        weights.append(value := OrtValue.ortvalue_from_numpy_with_onnx_type(bits, tensor.data_type))
        options.add_initializer(tensor.name, value)
    return weights


def _register_kernels(options: Any) -> Kernels | None:
    import onnxruntime as ort

    library = cpu_library() if wants_kernels() else None
    if library is None:
        return None
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        reason = str(error).rpartition(" : ")[2].removeprefix("glm-export's kernels: ")
        if type(error).__name__ == "InvalidArgument":
            raise UsageError(reason) from error
        raise BackendError(
            f"onnxruntime {ort.__version__} can not use the kernels in {library} ({reason}): install glm-export again."
        ) from error
    return cpu_kernels(library)


def _check_bindings(nodes: Any, bindings: tuple[Binding, ...], what: str) -> None:
    seen = [(node.name, node.type) for node in nodes]
    expected = [(binding.name, f"tensor({_ORT_TYPES[binding.dtype]})") for binding in bindings]
    if seen == expected:
        return
    odd = sorted(set(seen) ^ set(expected)) or seen
    raise IntegrityError(
        f"The {what} of model.onnx are not those of the manifest's contract (see {odd[0][0]}, {odd[0][1]}): "
        "build the bundle again."
    )


def _shape(binding: Binding, dims: dict[str, int]) -> tuple[int, ...]:
    return tuple(dims[dim] if isinstance(dim, str) else dim for dim in binding.shape)
