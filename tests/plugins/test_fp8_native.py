"""plugins/fp8_native.py bit for bit against the definition in plugins/fp8.py, in every form of the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cpu_tools
import pytest
import torch
from torch import Tensor

from glm_export.plugins import fp8, fp8_native
from glm_export.plugins.fp8_native import quantize_rows
from glm_export.plugins.library import CPU_VARIABLE, PORTABLE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOT_FINITE = (float("nan"), -float("nan"), float("inf"), float("-inf"))


@pytest.fixture(params=[*cpu_tools.ISAS, PORTABLE], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    library = cpu_tools.built_library() if request.param == PORTABLE else cpu_tools.library_for(request.param)
    if library is None:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv(CPU_VARIABLE, request.param)
    monkeypatch.setattr(fp8_native, "cpu_library", lambda: library)
    fp8_native._function.cache_clear()
    yield str(request.param)
    fp8_native._function.cache_clear()


def expect_equal_bits(x: Tensor) -> None:
    quantized = quantize_rows(x)
    assert quantized is not None
    for got, want in zip(quantized, fp8.quantize_rows(x), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def finite(dtype: torch.dtype) -> Tensor:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    return every[every.isfinite()]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 31, 64, 255, 1000])
def test_every_finite_16_bit_number(dtype: torch.dtype, width: int) -> None:
    x = finite(dtype)
    x = x[: len(x) // width * width]
    expect_equal_bits(x.view(-1, width))  # neighbours: rows of one magnitude
    expect_equal_bits(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))].view(-1, width))


@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-30, 1e-3, 1.0, 1e4, 1e37])
@pytest.mark.parametrize("shape", [(300, 64), (3, 5, 7, 33), (10, 1), (1, 10000), (2, 257)], ids=str)
def test_random_float32(shape: tuple[int, ...], scale: float) -> None:
    expect_equal_bits(random(*shape) * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width_around_vectors_and_tiles(dtype: torch.dtype) -> None:
    for width in (*range(1, 70), 127, 128, 129, 255, 256, 257, 288, 511, 513, 1030, 4097):
        expect_equal_bits(random(3, width, seed=width).to(dtype))


def test_random_bits_of_float32() -> None:
    # Rows that span all exponents and mantissas; what is not finite becomes zero.
    bits = torch.randint(-(1 << 31), 1 << 31, (4000, 77), generator=torch.Generator().manual_seed(2))
    x = bits.to(torch.int32).view(torch.float32)
    expect_equal_bits(torch.where(x.isfinite(), x, 0.0))


def test_every_tie_and_its_neighbours() -> None:
    # amax 448 makes the scale 1. Halfway between neighbours of E4M3, the even mantissa wins.
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    around = [ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(500.0)), numbers]
    x = torch.cat([*around, *(-each for each in around)])
    expect_equal_bits(x[None])


def test_zero_rows_and_denormal_scales() -> None:
    x = random(6, 40)
    x[1], x[2] = 0.0, -0.0
    x[3] = 600 * 2.0**-149  # the scale rounds down to the smallest denormal, which leaves values above 448
    x[4] = 100 * 2.0**-149  # and here to zero
    expect_equal_bits(x)
    quantized = quantize_rows(x)
    assert quantized is not None
    assert quantized[1][[1, 2, 4]].tolist() == [1, 1, 1]
    assert quantized[0].float()[3].eq(448).all()


def test_no_rows() -> None:
    quantized = quantize_rows(torch.empty(0, 8))
    assert quantized is not None
    assert quantized[0].shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("at", [(0, 0), (4, 20), (7, 66)])
def test_what_is_not_finite_is_noticed(dtype: torch.dtype, bad: float, at: tuple[int, int]) -> None:
    x = random(8, 67).to(dtype)
    assert quantize_rows(x) is not None
    x[at] = bad
    assert quantize_rows(x) is None


def test_the_largest_number_is_finite() -> None:
    for dtype in DTYPES:
        expect_equal_bits(torch.full((2, 40), torch.finfo(dtype).max, dtype=dtype))


def test_several_threads_at_once() -> None:
    blocks = [random(50, 300, seed=seed).bfloat16() for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for x, quantized in zip(blocks, pool.map(quantize_rows, blocks), strict=True):
            assert quantized is not None
            assert torch.equal(quantized[0].view(torch.uint8), fp8.quantize_rows(x)[0].view(torch.uint8))


def test_an_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="sse9"):
        quantize_rows(random(2, 4))
