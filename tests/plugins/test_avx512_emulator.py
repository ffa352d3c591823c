"""Does the emulator compute what AVX-512 does? NumPy and fractions tell, of a processor too, where there is one."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cpu_tools
import ml_dtypes
import numpy as np
import pytest

Array = np.ndarray[Any, Any]

LEAST = 2.0**-126
"""The smallest normal float32, and bfloat16."""


@pytest.fixture(scope="module", params=["emulator", "processor"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    needed = "avx2" if request.param == "emulator" else "avx512"
    if not cpu_tools.machine_has(needed):
        pytest.skip(f"this machine has no {needed}")
    flags = cpu_tools.EMULATED if request.param == "emulator" else ["-march=native", "-Wno-uninitialized"]
    path: Path = tmp_path_factory.mktemp("avx512") / "libprobe.so"
    source = cpu_tools.EMULATOR / "probe.cpp"
    compiled = [cpu_tools.compiler(), *cpu_tools.FLAGS, "-Wno-maybe-uninitialized", *flags, "-shared", source]
    subprocess.run([*compiled, "-o", path], check=True)
    return ctypes.CDLL(str(path))


def vector(values: Array) -> Array:
    """64 aligned bytes that begin with these."""
    memory = np.zeros(128, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + 64]
    aligned[: values.nbytes] = np.ascontiguousarray(values).view(np.uint8)
    return aligned


def run(library: ctypes.CDLL, name: str, *operands: Array) -> Array:
    """The 64 bytes that a probe leaves where there were ones."""
    y = vector(np.ones(64, np.uint8))
    given = [vector(x) for x in operands]
    addresses = [x.ctypes.data for x in given] + [None] * (3 - len(given)) + [y.ctypes.data]
    getattr(library, name)(*map(ctypes.c_void_p, addresses))
    return y


def i32(x: Array) -> Array:
    return x.view(np.int32)


def u32(x: Array) -> Array:
    return x.view(np.uint32)


def bits(x: Array) -> Array:
    """From bit 0 on."""
    return np.unpackbits(x, bitorder="little")


def where(mask: Array, yes: Any, no: Any, dtype: Any) -> Array:
    """By the bits of a mask; as bytes."""
    count = 64 // np.dtype(dtype).itemsize
    return np.where(bits(mask)[:count] == 1, yes, no).astype(dtype).view(np.uint8)


def logic(table: int) -> Callable[[Array, Array, Array], Array]:
    def apply(a: Array, b: Array, c: Array) -> Array:
        entries = np.array([table >> i & 1 for i in range(8)], np.uint8)
        return np.packbits(entries[4 * bits(a) + 2 * bits(b) + bits(c)], bitorder="little")

    return apply


def unpack(dtype: Any, *, upper: bool) -> Callable[[Array, Array, Array], Array]:
    def apply(a: Array, b: Array, c: Array) -> Array:
        lanes = [x.view(dtype).reshape(4, 2, -1)[:, int(upper)] for x in (a, b)]
        return np.stack(lanes, axis=-1).reshape(-1).view(np.uint8)

    return apply


INTEGERS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "load_si512": lambda a, b, c: a,
    "load_ps": lambda a, b, c: a,
    "store_si512": lambda a, b, c: a,
    "store_ps": lambda a, b, c: a,
    "maskz_loadu_epi8": lambda a, b, c: where(b, a, 0, np.uint8),
    "setzero": lambda a, b, c: np.zeros(64, np.uint8),
    "set1_ps": lambda a, b, c: np.tile(a[:4], 16),
    "set1_epi32": lambda a, b, c: np.tile(a[:4], 16),
    "set1_epi8": lambda a, b, c: np.tile(a[:1], 64),
    "cast": lambda a, b, c: a,
    "castsi512_si256": lambda a, b, c: a[:32],
    "extracti64x4_0": lambda a, b, c: a[:32],
    "extracti64x4_1": lambda a, b, c: a[32:],
    "and_si512": lambda a, b, c: a & b,
    "or_si512": lambda a, b, c: a | b,
    "add_epi32": lambda a, b, c: u32(a) + u32(b),
    "sub_epi32": lambda a, b, c: u32(a) - u32(b),
    "min_epi32": lambda a, b, c: np.minimum(i32(a), i32(b)),
    "slli_epi32_4": lambda a, b, c: u32(a) << 4,
    "slli_epi32_32": lambda a, b, c: np.zeros(64, np.uint8),
    "srli_epi32_20": lambda a, b, c: u32(a) >> 20,
    "srli_epi32_32": lambda a, b, c: np.zeros(64, np.uint8),
    "srai_epi32_20": lambda a, b, c: i32(a) >> 20,
    "srai_epi32_32": lambda a, b, c: i32(a) >> 31,
    "cmpgt_epi32_mask": lambda a, b, c: np.packbits(i32(a) > i32(b), bitorder="little"),
    "mask_blend_epi32": lambda a, b, c: where(c, u32(b), u32(a), np.uint32),
    "ternarylogic_f8": logic(0xF8),
    "ternarylogic_ca": logic(0xCA),
    "permutex2var_epi8": lambda a, b, c: np.concatenate([a, c])[b & 127],
    "unpacklo_epi8": unpack(np.uint8, upper=False),
    "unpackhi_epi8": unpack(np.uint8, upper=True),
    "unpacklo_epi32": unpack(np.uint32, upper=False),
    "unpackhi_epi32": unpack(np.uint32, upper=True),
    "unpacklo_epi64": unpack(np.uint64, upper=False),
    "unpackhi_epi64": unpack(np.uint64, upper=True),
    "shuffle_i32x4_88": lambda a, b, c: np.concatenate([a[0:16], a[32:48], b[0:16], b[32:48]]),
    "shuffle_i32x4_d8": lambda a, b, c: np.concatenate([a[0:16], a[32:48], b[16:32], b[48:64]]),
    "cvtepi32_epi16": lambda a, b, c: a.view(np.uint16)[::2],
    "cvtepi32_epi8": lambda a, b, c: a[::4],
    "cvtph_ps": lambda a, b, c: a.view(np.float16)[:16].astype(np.float32),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_bits(library: ctypes.CDLL, name: str) -> None:
    generator = np.random.default_rng(len(name))
    for _ in range(100):
        a, b, c = generator.integers(0, 256, (3, 64), np.uint8)
        if name in ("cvtph_ps", "set1_ps"):
            a[1::2] &= 0xBF  # finite: the payload of a NaN is not what this is about
        want = np.ascontiguousarray(INTEGERS[name](a, b, c)).view(np.uint8)
        assert np.array_equal(run(library, name, a, b, c)[: len(want)], want)


def rounded(exact: Fraction) -> np.float32:
    """To nearest even. A float64 rounded to odd keeps what the second rounding has to know."""
    near = float(exact)
    if Fraction(near) != exact and not np.float64(near).view(np.uint64) & np.uint64(1):
        near = float(np.nextafter(near, np.inf if exact > Fraction(near) else -np.inf))
    return np.float32(near)


def numbers(generator: np.random.Generator, *, low: int, high: int, dtype: Any = np.float32) -> Array:
    """16 or 32 numbers of either sign between powers of two, a few of them zero."""
    count = 64 // np.dtype(dtype).itemsize
    found = generator.uniform(1, 2, count) * 2.0 ** generator.integers(low, high, count)
    found *= generator.choice([-1, 1, 1, -1, 0], count)
    return found.astype(dtype)


@pytest.mark.parametrize("exponent", [-140, -60, 0, 12])
def test_float32(library: ctypes.CDLL, exponent: int) -> None:
    generator = np.random.default_rng(200 + exponent)
    for _ in range(50):
        a, b, c = (numbers(generator, low=exponent - 12, high=exponent + 12) for _ in range(3))
        b[b == 0] = 1
        assert np.array_equal(run(library, "add_ps", a, b).view(np.float32), a + b)
        with np.errstate(over="ignore"):
            assert np.array_equal(run(library, "div_ps", a, b).view(np.float32), a / b)
        want = [
            rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
            for x, y, z in zip(a, b, c, strict=True)
        ]
        assert np.array_equal(run(library, "fmadd_ps", a, b, c).view(np.float32), np.array(want))


def test_sum_of_a_vector(library: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        a = generator.integers(-1000, 1000, 16).astype(np.float32)
        assert run(library, "reduce_add_ps", a).view(np.float32)[0] == a.sum()


def flushed(x: float) -> float:
    return x if abs(x) >= LEAST else 0.0


def dot_pair(total: Any, x: Array, y: Array) -> float:
    """The sum with the products of two pairs, odd numbers first."""
    result = flushed(float(total))
    for i in (1, 0):
        product = Fraction(flushed(float(x[i]))) * Fraction(flushed(float(y[i])))
        result = flushed(float(rounded(Fraction(result) + product)))
    return result


@pytest.mark.parametrize(
    ("sums", "factors"),
    [((-10, 10), (-8, 8)), ((-1, 25), (-2, 12)), ((-130, -110), (-66, -55)), ((-140, -120), (-135, -120))],
    ids=["usual", "cancelling", "results_near_subnormal", "factors_subnormal"],
)
def test_bfloat16_products(library: ctypes.CDLL, sums: tuple[int, int], factors: tuple[int, int]) -> None:
    generator = np.random.default_rng(1000 + sums[1])
    for _ in range(200):
        total = numbers(generator, low=sums[0], high=sums[1])
        x, y = (numbers(generator, low=factors[0], high=factors[1], dtype=ml_dtypes.bfloat16) for _ in range(2))
        got = run(library, "dpbf16_ps", total, x, y).view(np.float32)
        want = [dot_pair(total[i], x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]) for i in range(16)]
        assert got.tolist() == want


def test_order_of_bfloat16_products(library: ctypes.CDLL) -> None:
    total = np.ones(16, np.float32)
    large = np.tile([-4096, 4096], 16).astype(ml_dtypes.bfloat16)
    got = run(library, "dpbf16_ps", total, large, np.abs(large)).view(np.float32)
    assert not got.any()  # the even product first would leave 1


def test_bytes_outside_a_mask_are_not_read(library: ctypes.CDLL) -> None:
    page = 4096
    pages = ctypes.CDLL(None)
    pages.mmap.restype = ctypes.c_void_p
    pages.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    pages.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pages.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    start = pages.mmap(None, 2 * page, 3, 0x22, -1, 0)  # readable, writable, private, of no file
    assert pages.mprotect(start + page, page, 0) == 0
    ctypes.memset(start, 7, page)
    mask, y = vector(np.array([(1 << 13) - 1], np.uint64)), vector(np.ones(64, np.uint8))
    library.maskz_loadu_epi8(*(ctypes.c_void_p(p) for p in (start + page - 13, mask.ctypes.data, None, y.ctypes.data)))
    pages.munmap(start, 2 * page)
    assert y.tolist() == [7] * 13 + [0] * 51
