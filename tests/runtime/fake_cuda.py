"""A GPU in host memory, behind the functions of cuda.bindings.runtime that the runtime calls.

Strict where CUDA is strict, and lazy where CUDA is: what is put on a stream happens when somebody waits for it. Memory
is real, so a pointer can be given to whatever runs the engine; a copy that is not wholly inside one live allocation of
the right kind is an error, and so is anything but stream work during a capture.
"""

# ruff: noqa: N802, N815 - the names are CUDA's

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

Work = Callable[[], None]


class CudaErrorCode(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


OK = CudaErrorCode.cudaSuccess
TEXTS = {
    CudaErrorCode.cudaErrorInvalidValue: b"invalid argument",
    CudaErrorCode.cudaErrorMemoryAllocation: b"out of memory",
    CudaErrorCode.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
    CudaErrorCode.cudaErrorIllegalAddress: b"an illegal memory access was encountered",
    CudaErrorCode.cudaErrorStreamCaptureUnsupported: b"operation not permitted when stream is capturing",
    CudaErrorCode.cudaErrorStreamCaptureInvalidated: b"operation failed due to a previous error during capture",
}


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class FakeCuda:
    """The module and the device behind it."""

    cudaError_t = CudaErrorCode
    cudaMemcpyKind = Kind
    cudaStreamNonBlocking = 1
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76)

    def __init__(self, *, gpus: int = 1, capability: tuple[int, int] = (8, 9), memory: int = 1 << 30) -> None:
        self.gpus = gpus
        self.capability = capability
        self.memory = memory
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.capturing: list[Work] | None = None
        self.invalidated = False
        self.broken: CudaErrorCode = OK
        self.launches = 0
        self.calls: list[str] = []
        self._handles = iter(range(1000, 1 << 30))

    # What the tests and the fake engine ask

    @property
    def used(self) -> int:
        return sum(map(len, self.device.values()))

    def leftovers(self) -> dict[str, int]:
        """What was made and not freed."""
        kinds = ("device", "pinned", "streams", "graphs", "executables")
        return {kind: len(getattr(self, kind)) for kind in kinds if getattr(self, kind)}

    def view(self, address: int, nbytes: int) -> np.ndarray | None:
        """Device memory, or None if that is not wholly inside one allocation."""
        return self._inside(self.device, address, nbytes)

    def put(self, stream: int, work: Work) -> CudaErrorCode:
        """What a library does when it is told to run."""
        if self.broken:
            return self.broken
        assert stream in self.streams, "no such stream"
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self.streams[stream].append(work)
        return OK

    # Functions of the runtime

    def cudaGetErrorString(self, code: CudaErrorCode) -> tuple[CudaErrorCode, bytes]:
        return OK, TEXTS[code]

    def cudaGetLastError(self) -> tuple[CudaErrorCode]:
        return (self.broken,)

    def cudaGetDeviceCount(self) -> tuple[CudaErrorCode, int | None]:
        return (OK, self.gpus) if self.gpus else (CudaErrorCode.cudaErrorInsufficientDriver, None)

    def cudaGetDevice(self) -> tuple[CudaErrorCode, int]:
        return OK, 0

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[CudaErrorCode, int]:
        return OK, self.capability[attribute - 75]

    def cudaGetDeviceProperties(self, device: int) -> tuple[CudaErrorCode, Any]:
        return OK, SimpleNamespace(name=b"Toy GPU")

    def cudaMemGetInfo(self) -> tuple[CudaErrorCode, int, int]:
        return OK, self.memory - self.used, self.memory

    def cudaMalloc(self, nbytes: int) -> tuple[CudaErrorCode, int | None]:
        if code := self._synchronous("cudaMalloc"):
            return code, None
        if self.used + nbytes > self.memory:
            return CudaErrorCode.cudaErrorMemoryAllocation, None
        return OK, self._allocate(self.device, nbytes)

    def cudaMallocHost(self, nbytes: int) -> tuple[CudaErrorCode, int | None]:
        if code := self._synchronous("cudaMallocHost"):
            return code, None
        return OK, self._allocate(self.pinned, nbytes)

    def cudaFree(self, address: int) -> tuple[CudaErrorCode]:
        assert not any(self.streams.values()), "memory is freed while work waits"
        del self.device[address]
        return (self._synchronous("cudaFree"),)

    def cudaFreeHost(self, address: int) -> tuple[CudaErrorCode]:
        del self.pinned[address]
        return (OK,)

    def cudaMemset(self, address: int, value: int, nbytes: int) -> tuple[CudaErrorCode]:
        if code := self._synchronous("cudaMemset"):
            return (code,)
        memory = self.view(address, nbytes)
        if memory is None:
            return (CudaErrorCode.cudaErrorInvalidValue,)
        memory[:] = value
        return (OK,)

    def cudaMemcpy(self, target: int, source: int, nbytes: int, kind: Kind) -> tuple[CudaErrorCode]:
        if code := self._synchronous("cudaMemcpy"):
            return (code,)
        memory = self.view(source, nbytes)
        if memory is None or kind != Kind.cudaMemcpyDeviceToHost:
            return (CudaErrorCode.cudaErrorInvalidValue,)
        np.copyto(_at(target, nbytes), memory)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Kind, stream: int) -> tuple[CudaErrorCode]:
        self.calls.append("cudaMemcpyAsync")
        pools = (self.device, self.pinned) if kind == Kind.cudaMemcpyHostToDevice else (self.pinned, self.device)

        def copy() -> None:
            into, out = (self._inside(pool, at, nbytes) for pool, at in zip(pools, (target, source), strict=True))
            if into is None or out is None:
                self.broken = CudaErrorCode.cudaErrorIllegalAddress
            else:
                np.copyto(into, out)

        if any(self._inside(pool, at, nbytes) is None for pool, at in zip(pools, (target, source), strict=True)):
            return (CudaErrorCode.cudaErrorInvalidValue,)
        return (self.put(stream, copy),)

    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[CudaErrorCode]:
        if width > pitch or (height and self.view(address, (height - 1) * pitch + width) is None):
            return (CudaErrorCode.cudaErrorInvalidValue,)

        def fill() -> None:
            for row in range(height):
                _at(address + row * pitch, width)[:] = value

        return (self.put(stream, fill),)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaErrorCode, int]:
        assert flags == self.cudaStreamNonBlocking
        handle = next(self._handles)
        self.streams[handle] = []
        return OK, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[CudaErrorCode]:
        del self.streams[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[CudaErrorCode]:
        code = self._synchronous("cudaStreamSynchronize")
        if not code:
            self._do(self.streams[stream])
        return (code or self.broken,)

    def cudaDeviceSynchronize(self) -> tuple[CudaErrorCode]:
        code = self._synchronous("cudaDeviceSynchronize")
        for queue in self.streams.values():
            self._do(queue)
        return (code or self.broken,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[CudaErrorCode]:
        assert self.capturing is None, "a capture is under way"
        assert not self.streams[stream], "a capture begins while work waits"
        self.capturing = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[CudaErrorCode, int | None]:
        assert self.capturing is not None, "no capture is under way"
        work, self.capturing = self.capturing, None
        if self.invalidated:
            self.invalidated = False
            return CudaErrorCode.cudaErrorStreamCaptureInvalidated, None
        handle = next(self._handles)
        self.graphs[handle] = work
        return OK, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[CudaErrorCode, int]:
        handle = next(self._handles)
        self.executables[handle] = list(self.graphs[graph])
        return OK, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[CudaErrorCode]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[CudaErrorCode]:
        del self.executables[executable]
        return (OK,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[CudaErrorCode]:
        self.launches += 1
        self.calls.append("cudaGraphLaunch")
        for work in self.executables[executable]:
            if code := self.put(stream, work):
                return (code,)
        return (OK,)

    def _synchronous(self, name: str) -> CudaErrorCode:
        """The outcome of a call that waits for the device: forbidden, and the end of it, during a capture."""
        self.calls.append(name)
        if self.capturing is not None:
            self.invalidated = True
            return CudaErrorCode.cudaErrorStreamCaptureUnsupported
        return self.broken

    def _do(self, queue: list[Work]) -> None:
        while queue:
            work = queue.pop(0)
            if not self.broken:
                work()

    def _allocate(self, pool: dict[int, np.ndarray], nbytes: int) -> int:
        memory = np.full(nbytes + 256, 0xA5, np.uint8)  # never zero by luck
        start = -memory.ctypes.data % 256
        address = memory.ctypes.data + start
        pool[address] = memory[start : start + nbytes]
        return address

    @staticmethod
    def _inside(pool: dict[int, np.ndarray], address: int, nbytes: int) -> np.ndarray | None:
        for start, memory in pool.items():
            if start <= address and address + nbytes <= start + len(memory):
                return memory[address - start : address - start + nbytes]
        return None


def _at(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
