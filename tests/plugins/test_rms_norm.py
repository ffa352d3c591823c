from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Evaluate, ExpectClose, RunKernel

U32 = 2.0**-24
EPSILON = 1e-5


def exact(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The result in float64 and what float32 inside and one rounding may make of it."""
    x64, D = x.double(), x.shape[-1]
    want = x64 / (x64.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()
    # D rounded squares and D sums of positives: D + 1; mean, epsilon: 2; their square root halves it. Then root (2),
    # reciprocal, two products.
    relative = ((D + 3) / 2 + 5) * U32
    info = torch.finfo(x.dtype)
    rounding = torch.maximum(want.abs(), torch.tensor(info.smallest_normal)) * info.eps / 2
    return want, want.abs() * relative * 1.001 + rounding * 1.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 4, 16), (5, 64), (2, 300)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e3], ids=["ordinary", "near_epsilon", "large"])
def test_float64(
    evaluate: Evaluate, expect_close: ExpectClose, dtype: torch.dtype, shape: tuple[int, ...], size: float
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=generator) * size).to(dtype)
    weight = torch.randn(shape[-1], generator=generator)
    (got,) = evaluate("RMSNorm", x, weight, epsilon=EPSILON)
    assert got.dtype == dtype
    expect_close(got, *exact(x, weight))


def test_zero_row_stays_zero(evaluate: Evaluate) -> None:
    x = torch.zeros(2, 8)
    x[1] = 1
    (got,) = evaluate("RMSNorm", x, torch.ones(8), epsilon=EPSILON)
    assert got[0].eq(0).all()
    assert got[1].isfinite().all()


def test_weight_is_used_as_it_is(evaluate: Evaluate) -> None:
    (got,) = evaluate("RMSNorm", torch.ones(1, 8), torch.zeros(8), epsilon=EPSILON)
    assert got.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_width(kernel: RunKernel, expect_close: ExpectClose, dtype: torch.dtype) -> None:
    for D in (*range(1, 18), 31, 32, 33, 255, 256, 257, 511, 512, 513, 1030, 5120):
        generator = torch.Generator().manual_seed(D)
        x = torch.randn(7, D, generator=generator).to(dtype)
        weight = torch.randn(D, generator=generator)
        (got,) = kernel("RMSNorm", {"x": x, "weight": weight}, epsilon=EPSILON)
        expect_close(got, *exact(x, weight), f"width {D}")
