"""Targets tensorrt and tensorrt-rtx: a bundle's engine on a GPU, with KV caches that are updated in place.

Two execution contexts, one per optimization profile, share the weights, the caches and the scratch memory; they never
run at the same time. A step copies three small arrays to the GPU, runs, and copies the logits back, all on one stream.
After the first decode step these operations are one CUDA graph; TensorRT-RTX makes a graph of its part by itself,
because only it knows when its kernels have become final.
"""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.contract import Binding
from glm_export.runtime.cuda import CudaError, DeviceBuffer, Graph, PinnedArray, Stream
from glm_export.runtime.engine_info import EngineInfo
from glm_export.runtime.errors import GlmExportError, IntegrityError, UsageError
from glm_export.runtime.session import Array, Ints, Session, StepOutput, numpy_dtype
from glm_export.runtime.trt_engine import DECODE, PREFILL, Engine, open_engine

_log = logging.getLogger("glm_export.tensorrt")


@dataclass(kw_only=True, slots=True)
class _Step:
    """The buffers of a step of S new tokens, bound to the context that runs it."""

    context: Any
    tokens: PinnedArray
    outputs: dict[str, PinnedArray]
    """logits, then the optional outputs."""
    to_device: list[tuple[DeviceBuffer, PinnedArray]]
    to_host: list[tuple[PinnedArray, DeviceBuffer]]
    owned: contextlib.ExitStack
    graph: Graph | None = None
    capturable: bool = False
    """Whether the next run may be captured: it is S = 1, and was not tried yet."""


class TensorRtSession(Session):
    """A bundle's TensorRT engine."""

    target: ClassVar[str] = "tensorrt"

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
        """Checks and loads the engine and zero-fills the caches; arguments and errors as `open_session` says."""
        if device not in (None, "cuda"):
            raise UsageError(f"There is no device {device!r} for {self.target}: its engines run on cuda.")
        if threads is not None:
            raise UsageError(f"threads is {threads}, but {self.target} runs on the GPU: leave it out.")
        info = EngineInfo.read(bundle, self.target)
        if cache_dtype not in (None, info.cache_dtype):
            raise UsageError(
                f"cache_dtype is {cache_dtype}, but the {self.target} engine was built for KV caches in "
                f"{info.cache_dtype}: leave it out."
            )
        _check_sizes(info, batch, capacity)
        default = min(bundle.manifest.batch, info.batch)
        super().__init__(bundle, batch=default if batch is None else batch, capacity=info.capacity)
        self.max_step_tokens = info.prefill
        bindings = self.contract.caches()
        self._cache_shape = tuple(self._dims(1)[dim] if isinstance(dim, str) else dim for dim in bindings[0].shape)
        self._cache_dtype = numpy_dtype(info.cache_dtype)
        cache_bytes = math.prod(self._cache_shape) * self._cache_dtype.itemsize
        self._owned = contextlib.ExitStack()
        try:
            self._engine: Engine | None = open_engine(bundle, info, cache_bytes=cache_bytes * len(bindings))
            self._owned.callback(self._drop_engine)
            self._stream = self._own(Stream())
            self._caches = {each.name: self._own(DeviceBuffer(cache_bytes, "KV caches")) for each in bindings}
            self._write_index, self._length_after = (PinnedArray((self.batch,), np.dtype(np.int64)) for _ in range(2))
            self._starts, self._ends = (self._own(DeviceBuffer(8 * self.batch, "inputs")) for _ in range(2))
            self._contexts = self._make_contexts(self._engine)
            self._steps: dict[int, _Step] = {}
            self._owned.callback(self._drop_contexts)
        except BaseException:
            self._owned.close()
            raise

    def cache(self, name: str) -> Array:
        """The KV cache `k_cache.{i}` or `v_cache.{i}`, [B,J,C,A]: a copy, in the dtype that the engine keeps it in."""
        copy = np.empty(self._cache_shape, self._cache_dtype)
        self._caches[name].read(copy)
        return copy

    def _execute(self, tokens: Array, write_index_B: Ints, length_B: Ints) -> StepOutput:
        try:
            step = self._steps.get(tokens.shape[1]) or self._bind(tokens.shape[1])
            step.tokens.array[...] = tokens
            self._write_index.array[...] = write_index_B
            self._length_after.array[...] = length_B
            if step.graph:
                step.graph.launch(self._stream)
            else:
                self._put(step)
            self._stream.synchronize()
        except CudaError:
            self.close()  # a device that failed does nothing any more, and its memory is gone
            raise
        if step.capturable:
            self._capture(step)
        logits, *extras = step.outputs.items()
        return StepOutput(logits=logits[1].array, extras={name: pinned.array.copy() for name, pinned in extras})

    def _put(self, step: _Step) -> None:
        """Puts a step on the stream: inputs to the GPU, the engine, outputs to the host."""
        for buffer, pinned in step.to_device:
            self._stream.to_device(buffer, pinned)
        if not step.context.execute_async_v3(self._stream.handle):
            raise self._failure("ran a step")
        for pinned, buffer in step.to_host:
            self._stream.to_host(pinned, buffer)

    def _capture(self, step: _Step) -> None:
        """Makes a CUDA graph of the step that has just run; without one, every step is put on the stream anew."""
        step.capturable = False
        try:
            step.graph = self._stream.capture(lambda: self._put(step))
        except GlmExportError as error:
            _log.warning("Decoding runs without a CUDA graph, and slower: %s", error)
            return
        step.owned.callback(step.graph.free)

    def _bind(self, new: int) -> _Step:
        """Binds every input and output for S = `new` and remembers the binding."""
        # Decoding (S = 1) alternates with chunks of one other size: those two are worth keeping.
        for size in [size for size in self._steps if size != 1]:
            self._steps.pop(size).owned.close()
        context = self._contexts[DECODE if new == 1 else PREFILL]
        with contextlib.ExitStack() as owned:
            step = self._buffers(context, new, owned)
            step.owned = owned.pop_all()
        self._steps[new] = step
        return step

    def _buffers(self, context: Any, new: int, owned: contextlib.ExitStack) -> _Step:
        first, *others = self.contract.inputs()
        shapes = {binding.name: self._shape(binding, new) for binding in (first, *others)}
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failure(f"was given {name} of shape {list(shape)}")
        tokens = PinnedArray(shapes[first.name], numpy_dtype(first.dtype))
        buffers = dict(self._caches) | {"write_index": self._starts, "length": self._ends}
        buffers[first.name] = self._own(DeviceBuffer(tokens.array.nbytes, "inputs"), owned)
        outputs: dict[str, PinnedArray] = {}
        for output in self.contract.outputs_of_step():
            shape = self._shape(output, new)
            if tuple(context.get_tensor_shape(output.name)) != shape:
                raise IntegrityError(
                    f"The engine's {output.name} has shape {list(context.get_tensor_shape(output.name))} for {new} new "
                    f"tokens, expected {list(shape)}: build the engine again."
                )
            if output.in_place_of is not None:
                buffers[output.name] = self._caches[output.in_place_of]
            else:
                pinned = outputs[output.name] = PinnedArray(shape, numpy_dtype(output.dtype))
                buffers[output.name] = self._own(DeviceBuffer(pinned.array.nbytes, output.name), owned)
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, buffer.address):
                raise self._failure(f"was given the address of {name}")
        return _Step(
            context=context,
            tokens=tokens,
            outputs=outputs,
            to_device=[
                (buffers[first.name], tokens),
                (self._starts, self._write_index),
                (self._ends, self._length_after),
            ],
            to_host=[(pinned, buffers[name]) for name, pinned in outputs.items()],
            owned=owned,
            capturable=new == 1 and not (self._engine and self._engine.library.is_rtx),
        )

    def _make_contexts(self, engine: Engine) -> tuple[Any, Any]:
        """The contexts of the two profiles. They share their scratch memory, since one stream runs both."""
        module, plan = engine.library.module, engine.plan
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        size = max(plan.get_device_memory_size_for_profile_v2(profile) for profile in (DECODE, PREFILL))
        scratch = self._own(DeviceBuffer(size, "scratch memory of the engine"))
        contexts = []
        for profile in (DECODE, PREFILL):
            if engine.library.is_rtx:
                config = plan.create_runtime_config()
                config.set_execution_context_allocation_strategy(strategy)
                if profile == DECODE:
                    config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                context = plan.create_execution_context(config)
            else:
                context = plan.create_execution_context(strategy)
            if context is None or not context.set_optimization_profile_async(profile, self._stream.handle):
                raise self._failure("made an execution context")
            self._stream.synchronize()
            context.set_device_memory(scratch.address, scratch.nbytes)
            contexts.append(context)
        return contexts[DECODE], contexts[PREFILL]

    def _clear(self, length_B: Ints) -> None:
        if self.closed:
            return
        _, heads, capacity, head_dim = self._cache_shape
        column = head_dim * self._cache_dtype.itemsize
        for buffer in self._caches.values():
            for row, length in enumerate(length_B.tolist()):
                start = buffer.address + (row * heads * capacity + length) * column
                self._stream.zero_columns(
                    start, pitch=capacity * column, width=(capacity - length) * column, rows=heads
                )
        self._stream.synchronize()

    def _close(self) -> None:
        self._owned.close()
        self._caches.clear()

    def _own(self, resource: Any, owned: contextlib.ExitStack | None = None) -> Any:
        """Frees the resource with the session, or with what `owned` belongs to."""
        (owned or self._owned).callback(resource.free)
        return resource

    def _drop_contexts(self) -> None:
        for step in self._steps.values():
            step.owned.close()
        self._steps.clear()
        del self._contexts

    def _drop_engine(self) -> None:
        self._engine = None

    def _failure(self, what: str) -> GlmExportError:
        assert self._engine is not None
        return self._engine.failure(what)

    def _dims(self, new: int) -> dict[str, int]:
        return {"B": self.batch, "S": new, "T": self.batch * new, "C": self.capacity}

    def _shape(self, binding: Binding, new: int) -> tuple[int, ...]:
        dims = self._dims(new)
        return tuple(dims[dim] if isinstance(dim, str) else dim for dim in binding.shape)


class TensorRtRtxSession(TensorRtSession):
    """A bundle's TensorRT-RTX engine."""

    target = "tensorrt-rtx"


def _check_sizes(info: EngineInfo, batch: int | None, capacity: int | None) -> None:
    """An engine's capacity is fixed, its rows are bounded."""
    again = f"build one with `glm-export engine BUNDLE --target {info.target} --replace"
    if capacity not in (None, info.capacity):
        raise UsageError(
            f"capacity is {capacity}, but the {info.target} engine was built for exactly {info.capacity}: leave it "
            f"out, or {again} --capacity {capacity}`."
        )
    if batch is not None and batch > info.batch:
        raise UsageError(
            f"batch is {batch}, but the {info.target} engine was built for at most {info.batch}: use fewer rows, or "
            f"{again} --max-batch {batch}`."
        )
