"""The few things a session asks of CUDA: which GPU there is, memory, one stream, graphs. Every return code is checked.

Freeing is the exception: after a failure of the device every call reports that failure again.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glm_export.runtime.errors import BackendError, ResourceError, missing_library

Array = npt.NDArray[Any]


class CudaError(BackendError):
    """A CUDA call failed; the sentence names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The GPU that this process uses: the first of CUDA_VISIBLE_DEVICES."""

    name: str
    compute_capability: str
    """Such as 9.0."""


def gpu(extra: str = "tensorrt") -> Gpu:
    """The GPU there is.

    Args:
        extra: of this package, to be named if cuda-python is not installed.

    Raises:
        BackendError: there is none, or no driver for it, or cuda-python is not installed.
    """
    try:
        cuda = _cuda()
    except ImportError:
        raise missing_library("Running an engine", "cuda-python", extra=extra) from None
    code, count = cuda.cudaGetDeviceCount()
    if code or not count:
        raise BackendError(
            f"There is no NVIDIA GPU that can be used ({_text(code) if code else 'none found'}): run on a machine with "
            "a GPU and its driver, or use the target onnxruntime."
        )
    device = _call("cudaGetDevice")
    attribute = cuda.cudaDeviceAttr
    major = _call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, device)
    minor = _call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, device)
    name = _call("cudaGetDeviceProperties", device).name
    return Gpu(name=name.decode(), compute_capability=f"{major}.{minor}")


def free_bytes() -> int:
    """The memory of the GPU that nobody holds."""
    free, _ = _call("cudaMemGetInfo")
    return int(free)


class DeviceBuffer:
    """Memory on the GPU, zero-filled."""

    def __init__(self, nbytes: int, what: str) -> None:
        """Allocates.

        Raises:
            ResourceError: there is not that much; the sentence says that it was for `what`.
        """
        self.nbytes = nbytes
        self.address = int(_allocate("cudaMalloc", what, max(nbytes, 1)))
        try:
            _call("cudaMemset", self.address, 0, nbytes)
        except CudaError:
            self.free()
            raise

    def read(self, into: Array) -> None:
        """Copies all bytes to the host, after everything that was put on any stream."""
        _call("cudaDeviceSynchronize")
        _call("cudaMemcpy", into.ctypes.data, self.address, self.nbytes, _cuda().cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def free(self) -> None:
        """Gives the memory back."""
        _cuda().cudaFree(self.address)


class PinnedArray:
    """A zero-filled array in host memory that the GPU copies from and to without the host's help.

    The memory lives as long as `array` or a view of it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Allocates.

        Raises:
            ResourceError: there is not that much.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        self.address = int(_allocate("cudaMallocHost", "host memory for copies", max(nbytes, 1)))
        memory = (ctypes.c_uint8 * nbytes).from_address(self.address)
        weakref.finalize(memory, _cuda().cudaFreeHost, self.address).atexit = False
        self.array: Array = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)
        self.array[...] = np.zeros((), dtype)


class Graph:
    """Work that was captured once and is put on a stream with one call."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable

    def launch(self, stream: Stream) -> None:
        """Puts the work on the stream."""
        _call("cudaGraphLaunch", self._executable, stream.handle)

    def free(self) -> None:
        """Destroys the graph."""
        _cuda().cudaGraphExecDestroy(self._executable)


class Stream:
    """The order in which the GPU does what it is told."""

    def __init__(self) -> None:
        self.handle = int(_call("cudaStreamCreateWithFlags", _cuda().cudaStreamNonBlocking))

    def to_device(self, target: DeviceBuffer, source: PinnedArray) -> None:
        """Copies an array to the beginning of a buffer, when its turn comes."""
        kind = _cuda().cudaMemcpyKind.cudaMemcpyHostToDevice
        _call("cudaMemcpyAsync", target.address, source.address, source.array.nbytes, kind, self.handle)

    def to_host(self, target: PinnedArray, source: DeviceBuffer) -> None:
        """Copies the beginning of a buffer to an array, when its turn comes."""
        kind = _cuda().cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call("cudaMemcpyAsync", target.address, source.address, target.array.nbytes, kind, self.handle)

    def zero_columns(self, address: int, *, pitch: int, width: int, rows: int) -> None:
        """Zeroes `width` bytes at the same place of each of `rows` rows that begin `pitch` bytes apart."""
        _call("cudaMemset2DAsync", address, pitch, 0, width, rows, self.handle)

    def synchronize(self) -> None:
        """Waits until everything is done."""
        _call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what `work` puts on this stream instead of doing it.

        Raises:
            CudaError: something of it can not be recorded. The stream can be used as before.
        """
        cuda = _cuda()
        # Thread-local: what other threads do meanwhile is their business.
        _call("cudaStreamBeginCapture", self.handle, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            code, graph = cuda.cudaStreamEndCapture(self.handle)
            if not code:
                cuda.cudaGraphDestroy(graph)
            cuda.cudaGetLastError()
            raise
        graph = _call("cudaStreamEndCapture", self.handle)
        try:
            return Graph(_call("cudaGraphInstantiate", graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)

    def free(self) -> None:
        """Destroys the stream."""
        _cuda().cudaStreamDestroy(self.handle)


@functools.cache
def _cuda() -> Any:
    return importlib.import_module("cuda.bindings.runtime")


def _call(name: str, *arguments: Any) -> Any:
    """Calls a function of the CUDA runtime; returns its result, or its results as a tuple."""
    code, *results = getattr(_cuda(), name)(*arguments)
    if code:
        raise CudaError(
            f"{name} failed ({_text(code)}): run the command again, and look at `nvidia-smi` and the system log if "
            "that does not help."
        )
    return results[0] if len(results) == 1 else tuple(results)


def _allocate(name: str, what: str, nbytes: int) -> Any:
    code, address = getattr(_cuda(), name)(nbytes)
    if code == _cuda().cudaError_t.cudaErrorMemoryAllocation:
        _cuda().cudaGetLastError()
        raise ResourceError(
            f"There is no room for {nbytes / 2**20:.1f} MiB of {what}: use fewer rows or a smaller prefill chunk, or "
            "end what else uses the GPU."
        )
    if code:
        raise CudaError(f"{name} failed ({_text(code)}): look at `nvidia-smi` and the system log.")
    return address


def _text(code: Any) -> str:
    _, text = _cuda().cudaGetErrorString(code)
    return str(text.decode())
