from __future__ import annotations

from typing import TYPE_CHECKING

import cuda_tools
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Evaluate

# No kernel for ONNX Runtime: the op is there for TensorRT.
EVALUATORS = ("reference", "onnxruntime", "onnx_reference", *cuda_tools.EVALUATORS)
every_form = pytest.mark.parametrize("evaluate", EVALUATORS, indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(x: Tensor) -> np.ndarray:
    return x.view(torch.uint8).numpy()


def e4m3_bits(x: Tensor) -> np.ndarray:
    return np.clip(x.float().numpy(), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def want_bits(cache: Tensor, update: Tensor, write_index: list[int]) -> np.ndarray:
    want, rows = bits(cache).copy(), e4m3_bits(update)
    B, J, C, _ = cache.shape
    for b in range(B):
        for j in range(J):
            for position in range(C):
                s = position - write_index[b]
                if 0 <= s < update.shape[2]:
                    want[b, j, position] = rows[b, j, s]
    return want


@every_form
@DTYPES
@pytest.mark.parametrize(
    ("B", "J", "C", "S", "A", "write_index"),
    [
        pytest.param(1, 1, 4, 1, 8, [0], id="smallest"),
        pytest.param(3, 2, 9, 1, 128, [0, 8, 4], id="decode"),
        pytest.param(2, 4, 40, 33, 64, [0, 7], id="prefill"),
        pytest.param(3, 2, 5, 3, 24, [3, 4, 5], id="beyond_the_capacity"),
        pytest.param(2, 1, 3, 5, 40, [0, 0], id="more_tokens_than_capacity"),
        pytest.param(2, 3, 60, 59, 24, [1, 0], id="odd_tail"),
    ],
)
def test_rows_land_where_they_belong(
    evaluate: Evaluate, dtype: torch.dtype, B: int, J: int, C: int, S: int, A: int, write_index: list[int]
) -> None:
    cache = random(B, J, C, A, seed=1).to(torch.float8_e4m3fn)
    update = random(B, J, S, A, seed=2).to(dtype)
    (got,) = evaluate("FP8CacheWrite", cache, update, torch.tensor(write_index, dtype=torch.int32))
    np.testing.assert_array_equal(bits(got), want_bits(cache, update, write_index))


@pytest.mark.parametrize("evaluate", ["reference", *cuda_tools.EVALUATORS], indirect=True)
@pytest.mark.parametrize("start", [-3, -1, -(2**31), 2**31 - 1])
def test_rows_outside_are_left_out(evaluate: Evaluate, start: int) -> None:
    cache, update = random(2, 2, 4, 8, seed=1).to(torch.float8_e4m3fn), random(2, 2, 3, 8, seed=2)
    (got,) = evaluate("FP8CacheWrite", cache, update, torch.tensor([start, 1], dtype=torch.int32))
    np.testing.assert_array_equal(bits(got), want_bits(cache, update, [start, 1]))


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_is_rounded_right(evaluate: Evaluate, dtype: torch.dtype) -> None:
    update = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(8, 4, 32, 64)
    update = update.where(update.isfinite(), 0)
    cache = torch.zeros(8, 4, 32, 64).to(torch.float8_e4m3fn)
    (got,) = evaluate("FP8CacheWrite", cache, update, torch.zeros(8, dtype=torch.int32))
    found, want = got.float(), torch.from_numpy(e4m3_bits(update)).view(torch.float8_e4m3fn).float()
    assert torch.equal(found, want)  # as numbers: standard ONNX has no word on the sign of a zero


@every_form
def test_ties_and_large_numbers(evaluate: Evaluate) -> None:
    # 17 is between 16 and 18, 19 between 18 and 20; 464 is a tie that would go up to 480 if there were one.
    update = torch.tensor([17.0, 19.0, -17.0, 464.0, -1e30, 2.0**-10, 3 * 2.0**-10, 0.0]).reshape(1, 1, 1, 8)
    cache = torch.ones(1, 1, 1, 8).to(torch.float8_e4m3fn)
    (got,) = evaluate("FP8CacheWrite", cache, update, torch.tensor([0], dtype=torch.int32))
    assert got.float().flatten().tolist() == [16, 20, -16, 448, -448, 0, 2.0**-8, 0]


@pytest.mark.parametrize("evaluate", ["reference", *cuda_tools.EVALUATORS], indirect=True)
@DTYPES
def test_infinity_saturates_and_nan_stays(evaluate: Evaluate, dtype: torch.dtype) -> None:
    update = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0] * 2).to(dtype).reshape(1, 1, 1, 8)
    cache = torch.ones(1, 1, 1, 8).to(torch.float8_e4m3fn)
    (got,) = evaluate("FP8CacheWrite", cache, update, torch.tensor([0], dtype=torch.int32))
    first = got.float().flatten()[:4].tolist()
    assert first[:2] == [448, -448]
    assert first[2] != first[2]
    assert first[3] == 1
