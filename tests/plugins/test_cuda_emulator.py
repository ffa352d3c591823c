"""Does the emulator compute what a GPU does, and does it see the mistakes that it is there for?"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from mmap import PAGESIZE

import cuda_tools
import pytest
import torch
from closeness import expect_close
from cuda_tools import EmulatedMemory, emulated_memory
from torch import Tensor

SEEDS = range(1, 6)


FAULTY, PROBE = (cuda_tools.EMULATOR / name for name in ("faulty.cu", "probe.cu"))


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    library = cuda_tools.emulated_library(FAULTY, PROBE)
    library.probe_error.restype = ctypes.c_char_p
    return library


@pytest.fixture
def memory(library: ctypes.CDLL) -> Iterator[EmulatedMemory]:
    with emulated_memory(library) as memory:
        yield memory


def probe(library: ctypes.CDLL, name: str, *arguments: int) -> str:
    """Runs a probe; the emulator's words, empty if all went well."""
    if run(library, name, *arguments) == 0:
        return ""
    text: bytes = library.probe_error()
    return text.decode()


def run(library: ctypes.CDLL, name: str, *arguments: int) -> int:
    wide = [ctypes.c_int64(x) if x > 2**31 else x for x in arguments]
    code: int = getattr(library, f"probe_{name}")(*wide)
    return code


Probe = Callable[..., Tensor]


@pytest.fixture(params=cuda_tools.EVALUATORS)
def on(request: pytest.FixtureRequest) -> Iterator[Probe]:
    """Runs a kernel of probe.cu that writes `shape` float32 numbers, on the emulator or on a GPU."""
    if request.param == "cuda_gpu":
        cuda_tools.machine(request.param)
        chosen, context = cuda_tools.gpu_library(PROBE), cuda_tools.gpu().memory()
    else:
        chosen = cuda_tools.emulated_library(FAULTY, PROBE)
        context = emulated_memory(chosen)
    with context as memory:

        def call(name: str, inputs: list[Tensor], shape: tuple[int, ...], *numbers: int) -> Tensor:
            addresses = [memory.place(x, alignment=16) for x in inputs]
            out = memory.empty(*shape, dtype=torch.float32)
            assert run(chosen, name, *addresses, out, *numbers) == 0
            return memory.get(out)

        yield call


def floats(memory: EmulatedMemory, count: int, *, alignment: int = 16) -> int:
    return memory.empty(count, dtype=torch.float32, alignment=alignment)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [32, 96, 1024])
@pytest.mark.parametrize("blocks", [1, 5])
def test_threads_meet_at_a_barrier(on: Probe, threads: int, blocks: int) -> None:
    x = random(blocks, threads)
    assert torch.equal(on("reverse", [x], (blocks, threads), blocks, threads, 1), x.flip(-1))


def test_asynchronous_copies(on: Probe) -> None:
    x = random(128)
    want = x.clone()
    want[4:8] = 0  # the thread whose copy is of zeros
    assert torch.equal(on("copies", [x], (128,), 1, 1, 0), want)


def test_warp_collectives(on: Probe) -> None:
    x = torch.randperm(32, generator=torch.Generator().manual_seed(0)).float()
    lane = torch.arange(32)
    votes = sum(1 << i for i in range(32) if x[i] > 15)
    assert on("collectives", [x], (6, 32)).tolist() == [
        x[5].expand(32).tolist(),
        x[lane ^ 3].tolist(),
        x[torch.where(lane < 2, lane, lane - 2)].tolist(),
        [votes >> 16] * 32,
        [31] * 32,
        [31 * 32 / 2] * 32,
    ]


@pytest.mark.parametrize(
    ("dtype", "number"), [(torch.float16, 10), (torch.bfloat16, 16), (torch.float8_e4m3fn, 17)], ids=str
)
def test_matrix_instructions(on: Probe, dtype: torch.dtype, number: int) -> None:
    K = 32 // dtype.itemsize
    a, b = random(16, K).to(dtype), random(8, K, seed=1).to(dtype)
    want, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    # Tensor cores keep the products and cut their sum off below 2^-13 (FP8) or about 2^-24 of the largest term.
    off = (2.0**-13 if dtype == torch.float8_e4m3fn else K * 2.0**-23) * size
    expect_close(on("product", [a, b], (16, 8), number), want, off)


def test_named_barriers(on: Probe) -> None:
    assert on("named_barriers", [], (128,)).tolist() == [i ^ 63 for i in range(128)]


def test_a_missing_barrier_shows(library: ctypes.CDLL) -> None:
    for seed in SEEDS:
        with emulated_memory(library, seed=seed) as memory:
            out = floats(memory, 64)
            assert probe(library, "reverse", memory.place(random(64)), out, 1, 64, 0) == ""
            assert memory.get(out).isnan().any()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("half_of_a_warp", "nobody can go on: 16 of 32 threads are in shuffle_xor, 16 have ended"),
        ("two_collectives", "of 32 threads while others are in"),
        ("part_of_a_warp", "shuffle_xor in a part of 32 threads that is not whole"),
        ("impolite", "the kernel ended without wait_for_previous_kernel()"),
    ],
)
def test_divergence(library: ctypes.CDLL, memory: EmulatedMemory, name: str, sentence: str) -> None:
    assert sentence in probe(library, name, floats(memory, 32))


def test_a_barrier_that_half_the_block_comes_to(library: ctypes.CDLL) -> None:
    assert "nobody can go on: 32 of 64 threads are in block_sync, 32 have ended" in probe(library, "half_at_a_barrier")


@pytest.mark.parametrize(("at", "size"), [(8, 8), (100_000, 8), (-1, PAGESIZE // 4), (-100_000, PAGESIZE // 4)])
def test_accesses_outside_a_buffer(library: ctypes.CDLL, memory: EmulatedMemory, at: int, size: int) -> None:
    out = floats(memory, size)  # of a whole page, so that it begins where nothing is accessible, too
    text = probe(library, "access", out, at)
    assert f"not allowed at offset {4 * at} of a buffer of {4 * size} bytes" in text
    assert "thread 3" in text
    assert probe(library, "access", out, size - 1) == ""


def test_writes_to_an_input(library: ctypes.CDLL, memory: EmulatedMemory) -> None:
    assert "not allowed at offset 8 of a buffer of 16 bytes" in probe(library, "access", memory.place(random(4)), 2)


def test_writes_into_the_slack_behind_a_buffer(library: ctypes.CDLL) -> None:
    memory = EmulatedMemory(library)
    out = floats(memory, 6)
    assert probe(library, "access", out, 6) == ""
    assert memory.close() == [((6,), torch.float32)]


def test_misaligned_accesses(library: ctypes.CDLL, memory: EmulatedMemory) -> None:
    text = probe(library, "misaligned", memory.place(random(32), alignment=16), floats(memory, 32))
    assert "undefined behaviour: a misaligned access" in text


@pytest.mark.parametrize(
    ("at", "sentence"), [(99, ""), (100, "wrote behind the shared memory"), (1024, "of 100 bytes of shared memory")]
)
def test_shared_memory_ends(library: ctypes.CDLL, at: int, sentence: str) -> None:
    text = probe(library, "behind_shared_memory", at)
    assert sentence in text
    assert bool(sentence) == bool(text)


@pytest.mark.parametrize(("committed", "waited"), [(1, 0), (1, 2), (0, 0), (0, 1)])
def test_copies_without_the_right_wait(
    library: ctypes.CDLL, memory: EmulatedMemory, committed: int, waited: int
) -> None:
    out = floats(memory, 128)
    text = probe(library, "copies", memory.place(random(128), alignment=16), out, committed, waited, 0)
    assert "asynchronous copies that nobody waited for" in text
    found = memory.get(out)  # of the threads that ran before one of them ended
    assert found.isnan().all()


def test_copies_from_a_misaligned_address(library: ctypes.CDLL, memory: EmulatedMemory) -> None:
    text = probe(library, "copies", memory.place(random(132), alignment=16), floats(memory, 128), 1, 1, 1)
    assert "the source is not aligned" in text


def test_a_full_stack(library: ctypes.CDLL, memory: EmulatedMemory) -> None:
    out = floats(memory, 1)
    assert probe(library, "deep", out, 3) == ""
    assert "the stack of 65536 bytes is full" in probe(library, "deep", out, 1000)


def test_waiting_for_a_condition(library: ctypes.CDLL, memory: EmulatedMemory) -> None:
    out = floats(memory, 64)
    assert probe(library, "spin", out) == ""
    assert memory.get(out).eq(1).all()


@pytest.mark.parametrize(
    "shape",
    [(0, 1, 32, 0), (1, 0, 32, 0), (1, 65536, 32, 0), (1, 1, 0, 0), (1, 1, 1056, 0), (1, 1, 32, 227 * 1024 + 1)],
)
def test_launches_that_no_gpu_takes(library: ctypes.CDLL, memory: EmulatedMemory, shape: tuple[int, ...]) -> None:
    assert "no GPU takes grid" in probe(library, "shape", *shape)


def test_an_error_leaves_nothing_behind(library: ctypes.CDLL, memory: EmulatedMemory) -> None:
    out = floats(memory, 64)
    assert probe(library, "half_of_a_warp", out)
    x = random(64)
    assert probe(library, "reverse", memory.place(x), out, 1, 64, 1) == ""
    assert torch.equal(memory.get(out), x.flip(0))
