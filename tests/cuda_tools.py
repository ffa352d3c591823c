"""The CUDA kernels on tensors: on the emulator, which any C++ compiler can build, or on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from glm_export.plugins.cuda.api import CudaKernels
from glm_export.plugins.library import cuda_library

REPOSITORY = Path(__file__).parents[1]
EMULATOR = REPOSITORY / "tests/plugins/cuda_emulator"
EVALUATORS = ("cuda_emulator", "cuda_gpu")

# Undefined behaviour ends in a trap, which the emulator reports; the usual runtime would have to be loaded first.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DGLM_EMULATE"]
FLAGS += ["-Wno-unknown-pragmas", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
FLAGS += [f"-I{REPOSITORY}", f"-I{EMULATOR}"]


class Memory(Protocol):
    """Where the kernels find their tensors."""

    stream: int

    def place(self, x: Tensor | None, *, alignment: int = 0, in_place: bool = False) -> int:
        """The address of a copy, 0 for None; the kernel may write to it if `in_place`."""

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 0) -> int:
        """The address of memory with unknown content."""

    def get(self, address: int) -> Tensor:
        """What is there now."""


class EmulatedMemory:
    """Every tensor between two inaccessible pages, inputs read-only."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self._tensors: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self.stream = 0

    def place(self, x: Tensor | None, *, alignment: int = 0, in_place: bool = False) -> int:
        if x is None:
            return 0
        address = self.empty(*x.shape, dtype=x.dtype, alignment=alignment)
        ctypes.memmove(address, x.contiguous().data_ptr(), x.nbytes)
        if not in_place:
            self._library.glm_cuda_emulator_protect(address)
        return address

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 0) -> int:
        size = torch.Size(shape).numel() * dtype.itemsize
        address: int = self._library.glm_cuda_emulator_allocate(size, alignment or dtype.itemsize)
        self._tensors[address] = shape, dtype
        return address

    def get(self, address: int) -> Tensor:
        shape, dtype = self._tensors[address]
        size = torch.Size(shape).numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=dtype).reshape(shape)

    def close(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Frees all; those that somebody wrote behind."""
        return [tensor for address, tensor in self._tensors.items() if self._library.glm_cuda_emulator_free(address)]


class GpuMemory:
    """Tensors of torch on the current CUDA device; what follows an output is checked to be left alone."""

    GUARD = 64
    """Bytes."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self.stream = torch.cuda.current_stream().cuda_stream

    def place(self, x: Tensor | None, *, alignment: int = 0, in_place: bool = False) -> int:
        if x is None:
            return 0
        address = self.empty(*x.shape, dtype=x.dtype)
        self._tensors[address][0].copy_(x)
        return address

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 0) -> int:
        size = torch.Size(shape).numel() * dtype.itemsize
        memory = torch.full((size + self.GUARD,), 255, dtype=torch.uint8, device="cuda")
        address = memory.data_ptr()
        self._tensors[address] = memory[:size].view(dtype).reshape(shape), memory[size:]
        return address

    def get(self, address: int) -> Tensor:
        return self._tensors[address][0].cpu()

    def close(self) -> None:
        torch.cuda.synchronize()
        for tensor, guard in self._tensors.values():
            assert bool(guard.eq(255).all()), f"somebody wrote behind {tuple(tensor.shape)} {tensor.dtype}"


_BUILT = tempfile.TemporaryDirectory(prefix="glm_cuda_emulator")


@cache
def emulated_library(*sources: Path) -> ctypes.CDLL:
    """The emulator and these kernels as one library, built once per test run."""
    compiler = shutil.which("c++")
    assert compiler, "the emulator needs a C++ compiler"
    folder = Path(tempfile.mkdtemp(dir=_BUILT.name))
    all_sources = (*EMULATOR.glob("*.cpp"), *sources)
    objects = {source: folder / f"{source.parent.name}_{source.name}.o" for source in all_sources}

    def compile_one(source: Path) -> None:
        command = [compiler, "-x", "c++", *FLAGS, "-c", source, "-o", objects[source]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source}:\n{done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, objects))
    path = folder / "libglm_cuda_emulated.so"
    subprocess.run([compiler, "-shared", "-Wl,-z,defs", *objects.values(), "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.glm_cuda_emulator_allocate.restype = ctypes.c_void_p
    library.glm_cuda_emulator_allocate.argtypes = [ctypes.c_int64, ctypes.c_int64]
    for name in ("protect", "free"):
        getattr(library, f"glm_cuda_emulator_{name}").argtypes = [ctypes.c_void_p]
    return library


@contextlib.contextmanager
def emulated_memory(
    library: ctypes.CDLL, *, sm: int = 90, seed: int = 1, multiprocessors: int = 132
) -> Iterator[EmulatedMemory]:
    """Memory for one test, on a device of compute capability `sm` / 10; `seed` draws the order of threads."""
    shared = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}[sm] * 1024
    library.glm_cuda_emulator_device(sm, multiprocessors, shared)
    library.glm_cuda_emulator_seed(seed)
    memory = EmulatedMemory(library)
    try:
        yield memory
    finally:
        damaged = memory.close()
    assert not damaged, f"somebody wrote behind {damaged}"


class Emulator:
    """The kernels on the emulator."""

    def __init__(self) -> None:
        self.library = emulated_library(*sorted((REPOSITORY / "plugins").glob("*/*.cu")))
        self.kernels = CudaKernels(Path(self.library._name))

    def memory(self, **device: int) -> contextlib.AbstractContextManager[EmulatedMemory]:
        """As emulated_memory."""
        return emulated_memory(self.library, **device)


@cache
def gpu_library(source: Path) -> ctypes.CDLL:
    """These kernels as a library for the GPU of this machine."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    path = Path(tempfile.mkdtemp(dir=_BUILT.name)) / "libprobe.so"
    flags = ["-std=c++17", "-arch=native", "-shared", "-Xcompiler=-fPIC", f"-I{REPOSITORY}"]
    subprocess.run([nvcc, *flags, source, "-o", path], check=True)
    return ctypes.CDLL(str(path))


class Gpu:
    """The kernels on the CUDA device of this machine."""

    def __init__(self) -> None:
        self.kernels = CudaKernels()

    @contextlib.contextmanager
    def memory(self, **_: int) -> Iterator[GpuMemory]:
        memory = GpuMemory()
        yield memory
        memory.close()


@cache
def emulator() -> Emulator:
    return Emulator()


@cache
def gpu() -> Gpu:
    return Gpu()


def machine(evaluator: str) -> Emulator | Gpu:
    """Where to run; skips the test where there is no such thing."""
    if evaluator == "cuda_emulator":
        return emulator()
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if cuda_library() is None:
        pytest.skip("libglm_cuda.so is not built: run `make cuda`")
    return gpu()


def run(
    evaluator: str,
    name: str,
    inputs: tuple[Tensor | None, ...],
    outputs: int,
    attributes: dict[str, Any],
    **device: int,
) -> list[Tensor]:
    """An op by its CUDA kernel, with all of its `outputs`; `device` is what the emulator is to be (emulated_memory)."""
    where = machine(evaluator)
    with where.memory(**device) as memory:
        found = [memory.get(address) for address in _CALLS[name](where.kernels, memory, inputs, attributes)]
    assert len(found) == outputs
    return found


def _moe_router(
    kernels: CudaKernels, memory: Memory, inputs: tuple[Tensor | None, ...], attributes: dict[str, Any]
) -> list[int]:
    logits, bias = inputs
    assert logits is not None
    (T, E), K = logits.shape, attributes["top_k"]
    ids, weights = memory.empty(T, K, dtype=torch.int32), memory.empty(T, K, dtype=torch.float32)
    kernels.moe_router(
        logits=memory.place(logits),
        correction_bias=memory.place(bias),
        expert_ids=ids,
        expert_weights=weights,
        T=T,
        E=E,
        **attributes,
        stream=memory.stream,
    )
    return [ids, weights]


def _fp8_cache_write(
    kernels: CudaKernels, memory: Memory, inputs: tuple[Tensor | None, ...], attributes: dict[str, Any]
) -> list[int]:
    cache, update, write_index = inputs
    assert cache is not None
    assert update is not None
    (B, J, C, A), S = cache.shape, update.shape[2]
    out = memory.place(cache, alignment=8, in_place=True)
    kernels.fp8_cache_write(
        cache=out,
        update=memory.place(update, alignment=16),
        write_index=memory.place(write_index),
        **{"B": B, "J": J, "C": C, "S": S, "A": A},
        update_type=str(update.dtype).removeprefix("torch."),
        stream=memory.stream,
    )
    return [out]


def _moe_experts(
    kernels: CudaKernels, memory: Memory, inputs: tuple[Tensor | None, ...], attributes: dict[str, Any]
) -> list[int]:
    hidden, expert_ids, expert_weights, gate_up, *rest = inputs
    gate_up_scale, down, down_scale = rest if len(rest) == 3 else (None, *rest, None)
    assert hidden is not None
    assert expert_ids is not None
    assert gate_up is not None
    (T, D), K, (E, F2, _) = hidden.shape, expert_ids.shape[1], gate_up.shape
    types = {"hidden_type": hidden.dtype, "weight_type": gate_up.dtype}
    common: dict[str, Any] = {name: str(dtype).removeprefix("torch.") for name, dtype in types.items()}
    common |= {"T": T, "D": D, "F": F2 // 2, "E": E, "K": K}
    workspace_bytes = kernels.moe_experts_workspace(**common)
    # What an earlier call left there, or what is no number.
    found = torch.full((workspace_bytes,), attributes.get("workspace", 255), dtype=torch.uint8)
    out = memory.empty(T, D, dtype=hidden.dtype, alignment=16)
    kernels.moe_experts(
        hidden=memory.place(hidden, alignment=16),
        expert_ids=memory.place(expert_ids),
        expert_weights=memory.place(expert_weights),
        gate_up=memory.place(gate_up, alignment=16),
        gate_up_scale=memory.place(gate_up_scale) or None,
        down=memory.place(down, alignment=16),
        down_scale=memory.place(down_scale) or None,
        out=out,
        workspace=memory.place(found, alignment=256, in_place=True),
        workspace_bytes=workspace_bytes,
        **common,
        path=attributes.get("path", "auto"),
        stream=memory.stream,
    )
    return [out]


_CALLS: dict[str, Callable[..., list[int]]] = {
    "MoERouter": _moe_router,
    "MoEExperts": _moe_experts,
    "FP8MoEExperts": _moe_experts,
    "FP8CacheWrite": _fp8_cache_write,
}
