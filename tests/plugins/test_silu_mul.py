from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Evaluate, ExpectClose, RunKernel

U32 = 2.0**-24


def exact(gate: Tensor, up: Tensor) -> Tensor:
    return gate.double() / (1 + (-gate.double()).exp()) * up.double()


def rounding(want: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return torch.maximum(want.abs(), torch.tensor(info.smallest_normal)) * info.eps / 2 * 1.001


def bounded(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    want = exact(gate, up)
    # A sigmoid is good to 4 units in the last place of 1 and not of itself (ONNX Runtime's is a rational function);
    # two products.
    inside = (gate.double() * up.double()).abs() * 4 * U32 + want.abs() * 2 * U32
    return want, inside + rounding(want, gate.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 3, 64), (7, 33)], ids=str)
def test_float64(evaluate: Evaluate, expect_close: ExpectClose, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    gate = (torch.randn(shape, generator=generator) * 8).to(dtype)
    up = torch.randn(shape, generator=generator).to(dtype)
    gate.view(-1)[:3] = torch.tensor([0.0, -80.0, 80.0])
    (got,) = evaluate("SiluMul", gate, up)
    expect_close(got, *bounded(gate, up))


def test_reference_keeps_small_sigmoids(expect_close: ExpectClose) -> None:
    gate = torch.linspace(-60, 60, 1201)
    up = torch.full_like(gate, 1.5)
    want = exact(gate, up)
    # exp within 2 units, sum, quotient, two products: relative, however small the sigmoid.
    expect_close(torch.ops.glm.silu_mul(gate, up), want, want.abs() * 8 * U32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("up_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_size(kernel: RunKernel, expect_close: ExpectClose, dtype: torch.dtype, up_dtype: torch.dtype) -> None:
    # Around a vector, a tile, the elements that are worth a task, and many tasks.
    for size in (*range(1, 18), 255, 256, 257, 16383, 16384, 16385, 70001):
        generator = torch.Generator().manual_seed(size)
        gate = (torch.randn(size, generator=generator) * 8).to(dtype)
        up = torch.randn(size, generator=generator).to(up_dtype)
        (got,) = kernel("SiluMul", {"gate": gate, "up": up})
        expect_close(got, *bounded(gate, up), f"{size} elements")
