from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cpu_tools
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from glm_export.plugins.fp8 import fake_quantize_rows

if TYPE_CHECKING:
    from conftest import Evaluate, ExpectClose, RunKernel

U32 = 2.0**-24
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize(
    ("lead", "inner", "outer"),
    [((1, 1), 16, 5), ((2, 3), 64, 33), ((2, 3, 4), 24, 8), ((7,), 512, 3)],
    ids=["one_token", "batch", "three_leading_dimensions", "long_row"],
)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, roundings: int) -> tuple[Tensor, Tensor]:
    """The product in float64 and the error of float32 sums in any order, plus `roundings` of each factor."""
    want = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    inside = (x.shape[-1] + 1 + roundings) * U32 * size
    info = torch.finfo(dtype)
    return want, inside + torch.maximum(want.abs() + inside, torch.tensor(info.smallest_normal)) * info.eps / 2


def rounded_twice(want: Tensor, bound: Tensor, product: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The bound where a product [..., O] is rounded to dtype before something else happens to it."""
    info = torch.finfo(dtype)
    return want, bound + torch.maximum(product.abs() + bound, torch.tensor(info.smallest_normal)) * info.eps / 2


def e4m3_rows(x: Tensor) -> Tensor:
    """x with its rows rounded to E4M3 by ml_dtypes; float64 products of scale and value."""
    rows = x.float().numpy()
    scale = np.abs(rows).max(axis=-1, keepdims=True) / np.float32(448)
    scale = np.where(scale > 0, scale, np.float32(1))
    values = np.clip(rows / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(values.astype(np.float64) * scale.astype(np.float64))


@DTYPES
@SHAPES
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_linear(
    evaluate: Evaluate,
    expect_close: ExpectClose,
    dtype: torch.dtype,
    lead: tuple[int, ...],
    inner: int,
    outer: int,
    with_bias: bool,
) -> None:
    generator = torch.Generator().manual_seed(inner)
    x = torch.randn(*lead, inner, generator=generator).to(dtype)
    weight = torch.randn(outer, inner, generator=generator).to(dtype)
    bias = torch.randn(outer, generator=generator) if with_bias else None
    (got,) = evaluate("Linear", x, weight, bias)
    assert got.dtype == dtype
    want, bound = exact(x, weight, bias, dtype, 0)
    if evaluate.form == "tensorrt" and with_bias and dtype != torch.float32:
        want, bound = rounded_twice(want, bound, x.double() @ weight.double().T, dtype)
    expect_close(got, want, bound)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weight_float32_result(evaluate: Evaluate, expect_close: ExpectClose, weight_dtype: torch.dtype) -> None:
    # The head: a bf16 x widened to float32, bf16 weights, float32 logits.
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(weight_dtype).float()
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2)).to(weight_dtype)
    (got,) = evaluate("Linear", x, weight, None)
    assert got.dtype == torch.float32
    want, bound = exact(x, weight, None, torch.float32, 0)
    if evaluate.form == "tensorrt":  # the factors are exact in float16, the product is rounded to it
        want, bound = rounded_twice(want, bound, want, torch.float16)
    expect_close(got, want, bound)


@DTYPES
@SHAPES
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_fp8_linear(
    evaluate: Evaluate,
    expect_close: ExpectClose,
    dtype: torch.dtype,
    lead: tuple[int, ...],
    inner: int,
    outer: int,
    with_bias: bool,
) -> None:
    generator = torch.Generator().manual_seed(inner)
    x = torch.randn(*lead, inner, generator=generator).to(dtype)
    x.view(-1, inner)[-1] *= 50  # a scale of its own per token
    weight = (torch.randn(outer, inner, generator=generator) * 100).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(outer, generator=generator) * 0.01 + 1e-3
    bias = torch.randn(outer, generator=generator) if with_bias else None
    (got,) = evaluate("FP8Linear", x, weight, weight_scale, bias)
    # Quantizing is exact arithmetic on the same numbers; value * scale is rounded once in either factor.
    expect_close(got, *exact(e4m3_rows(x), weight.double() * weight_scale.double()[:, None], bias, dtype, 2))


def test_fp8_rounding_alone(evaluate: Evaluate) -> None:
    # With the identity as weight every sum has one term: what is left is the rounding, bit for bit, of every finite
    # bfloat16 and of random rows.
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([bits[bits.isfinite()].float().view(-1, 16), torch.randn(1000, 16, generator=generator)])
    rows = rows[rows.abs().amax(-1) < 3e38 / 16]  # 0 * x_hat has to stay 0
    (got,) = evaluate("FP8Linear", rows, torch.eye(16).to(torch.float8_e4m3fn), torch.ones(16), None)
    assert len(rows) > 5000
    different = (got != fake_quantize_rows(rows)).nonzero()
    assert not len(different), [(rows[i], got[i], fake_quantize_rows(rows[i])) for i in different[:1, 0]]


def test_fp8_zero_token(evaluate: Evaluate) -> None:
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    bias = torch.arange(4.0)
    (got,) = evaluate("FP8Linear", torch.zeros(2, 8), weight, torch.ones(4), bias)
    assert torch.equal(got, bias.expand(2, 4))


# What kernels cut their work by: tokens and weight rows by tiles, the width by vectors, with a tail of each.
COUNTS = (*range(1, 18), 23, 24, 25, 31, 32, 33, 47, 48, 49, 64, 65, 200)
ROWS = (*range(1, 10), 15, 16, 17)
WIDTHS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1030, 4097, 5185)
FP8 = torch.float8_e4m3fn
WEIGHTS = pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, FP8], ids=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """Operands, and what their product [T, O] may be: any tokens and rows of it are a product as well."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    want: Tensor
    bound: Tensor

    def check(self, kernel: RunKernel, expect_close: ExpectClose, count: int, rows: int) -> None:
        inputs = {"x": self.x[:count], "weight": self.weight[:rows]}
        op = "FP8Linear" if self.weight.dtype == FP8 else "Linear"
        (got,) = kernel(op, inputs | ({"weight_scale": self.scale[:rows]} if op == "FP8Linear" else {}))
        where = (slice(count), slice(rows))
        expect_close(got, self.want[where], self.bound[where], f"{count} tokens, {rows} rows, {self.x.shape[1]} wide")


@functools.cache
def product(dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int, rows: int, width: int) -> Product:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(rows, width, generator=generator) * (100 if weight_dtype == FP8 else 1)
    weight, scale = weight.to(weight_dtype), torch.rand(rows, generator=generator) * 0.01 + 1e-3
    if weight_dtype == FP8:
        want, bound = exact(e4m3_rows(x), weight.double() * scale.double()[:, None], None, dtype, 2)
    else:
        want, bound = exact(x, weight, None, dtype, 0)
    return Product(x=x, weight=weight, scale=scale, want=want, bound=bound)


@DTYPES
@WEIGHTS
def test_tile_borders(
    kernel: RunKernel, expect_close: ExpectClose, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    whole = product(dtype, weight_dtype, max(COUNTS), max(ROWS), 67)
    for count, rows in itertools.product(COUNTS, ROWS):
        whole.check(kernel, expect_close, count, rows)


@DTYPES
@WEIGHTS
def test_vector_borders(
    kernel: RunKernel, expect_close: ExpectClose, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    for width in WIDTHS:
        whole = product(dtype, weight_dtype, 50, 6, width)
        for count in (1, 2, 3, 8, 9, 12, 13, 50):
            whole.check(kernel, expect_close, count, 6)


KERNELS = pytest.mark.parametrize("evaluate", cpu_tools.EVALUATORS, indirect=True)


# Around the sizes in which kernels cut vectors, blocks of the width, and rows of weights.
@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "weight_dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn],
    ids=["f32", "bf16", "f16", "e4m3"],
)
@pytest.mark.parametrize(
    ("inner", "outer"), [(1, 8), (33, 7), (64, 3), (129, 17), (255, 1), (1030, 20), (2112, 9), (4100, 19)], ids=str
)
def test_kernels_of_any_size(
    evaluate: Evaluate, dtype: torch.dtype, weight_dtype: torch.dtype, inner: int, outer: int
) -> None:
    # Small whole numbers: all sums are exact in any order, so every result is the only right one.
    generator = torch.Generator().manual_seed(inner)
    fp8 = weight_dtype == torch.float8_e4m3fn
    weight = torch.randint(-8, 9, (outer, inner), generator=generator).to(weight_dtype)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 33, 48, 64, 65, 100):
        x = torch.randint(-8, 9, (tokens, inner), generator=generator).to(dtype)
        if fp8:
            x[:, 0] = 448  # makes the token's scale 1
            (got,) = evaluate("FP8Linear", x, weight, torch.ones(outer), None)
        else:
            (got,) = evaluate("Linear", x, weight, None)
        want = (x.double() @ weight.double().T).to(dtype)
        assert torch.equal(got, want), (tokens, (got != want).nonzero()[0].tolist())


@KERNELS
@pytest.mark.parametrize("tokens", [1, 2, 5, 20])
def test_kernels_know_every_e4m3_number(evaluate: Evaluate, tokens: int) -> None:
    # Each token chooses one number of every row, and has a scale of 1 by the first column.
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()]
    weight = values.view(torch.uint8)[:, None].repeat(1, 100).view(torch.float8_e4m3fn)
    weight.view(torch.uint8)[:, 0] = 0
    x = torch.zeros(tokens, 100)
    x[:, 0] = 448
    x[torch.arange(tokens), 1 + 5 * torch.arange(tokens) % 99] = 1
    (got,) = evaluate("FP8Linear", x, weight, torch.ones(len(values)), None)
    assert len(values) == 254
    assert torch.equal(got, values.float().expand(tokens, -1))
