from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from conftest import Evaluate, RunKernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 64), (7, 333)], ids=str)
def test_is_rounded_once(evaluate: Evaluate, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    a, b = ((torch.randn(shape, generator=generator) * size).to(dtype) for size in (1, 10))
    (got,) = evaluate("ResidualAdd", a, b)
    # The sum of two numbers of 24 bits is exact in float64, that of two of 8 or 11 bits in float32 as well unless they
    # are far apart: then the float32 rounding never lands on a tie. So this is one rounding of the exact sum.
    assert got.dtype == dtype
    assert torch.equal(got, (a.double() + b.double()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_size(kernel: RunKernel, dtype: torch.dtype, update_dtype: torch.dtype) -> None:
    # Around a tile, the elements that are worth a task, and many tasks. Whole numbers, so that no sum is rounded twice.
    for size in (*range(1, 18), 255, 256, 257, 16383, 16384, 16385, 70001):
        generator = torch.Generator().manual_seed(size)
        x, update = (torch.randint(-2000, 2001, (size,), generator=generator) for _ in range(2))
        x, update = x.to(dtype), update.to(update_dtype)
        (got,) = kernel("ResidualAdd", {"x": x, "update": update})
        assert torch.equal(got, (x.double() + update.double()).to(dtype)), size
