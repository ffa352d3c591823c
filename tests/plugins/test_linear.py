from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from glm_export.plugins.fp8 import fake_quantize_rows

if TYPE_CHECKING:
    from conftest import Evaluate, ExpectClose

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
