"""The fused ops are the ops they stand for, bit for bit, in every form; how good those are is told elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cpu_tools
import pytest
import torch
from experts_bound import random
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Evaluate

EVALUATORS = ("reference", "onnxruntime", "onnx_reference", *cpu_tools.EVALUATORS)  # TensorRT never sees them
every_form = pytest.mark.parametrize("evaluate", EVALUATORS, indirect=True)
EPSILON = 1e-5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FP8 = pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])


def weight(*shape: int, seed: int, dtype: torch.dtype, fp8: bool) -> list[Tensor]:
    """A weight of the dtype, or one in E4M3 with its scales."""
    values = random(*shape, seed=seed) / shape[-1] ** 0.5
    if not fp8:
        return [values.to(dtype)]
    return [(values * 100).to(torch.float8_e4m3fn), random(*shape[:-1], seed=seed + 100).abs() / 100 + 1e-3]


def expect_same(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@every_form
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 64), (5, 300)], ids=str)
def test_add_rms_norm(evaluate: Evaluate, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, update = random(*shape, seed=1).to(dtype), (10 * random(*shape, seed=2)).to(dtype)
    scales = random(shape[-1], seed=3)
    got = evaluate("AddRMSNorm", x, update, scales, epsilon=EPSILON)
    (total,) = evaluate("ResidualAdd", x, update)
    expect_same(got, [total, *evaluate("RMSNorm", total, scales, epsilon=EPSILON)])


@every_form
@DTYPES
@FP8
@pytest.mark.parametrize(
    ("B", "S", "H", "J", "A", "D"),
    [
        pytest.param(1, 1, 1, 1, 8, 16, id="smallest"),
        pytest.param(3, 1, 6, 2, 16, 40, id="decode"),
        pytest.param(2, 30, 4, 4, 8, 64, id="as_many_keys_as_queries"),
        pytest.param(1, 400, 3, 1, 5, 33, id="odd_sizes_many_tokens"),
    ],
)
@pytest.mark.parametrize("biases", ["", "qkv", "k"])
def test_qkv_linear(
    evaluate: Evaluate, dtype: torch.dtype, fp8: bool, B: int, S: int, H: int, J: int, A: int, D: int, biases: str
) -> None:
    x = random(B, S, D, seed=1).to(dtype)
    parts = []
    for seed, (letter, heads) in enumerate({"q": H, "k": J, "v": J}.items()):
        bias = random(heads * A, seed=seed) if letter in biases else None
        parts.append([*weight(heads * A, D, seed=10 + seed, dtype=dtype, fp8=fp8), bias])
    prefix = "FP8" if fp8 else ""
    got = evaluate(f"{prefix}QkvLinear", x, *(tensor for part in parts for tensor in part), head_size=A)
    want = [evaluate(f"{prefix}Linear", x, *part)[0].unflatten(-1, (-1, A)) for part in parts]
    expect_same(got, want)


BLOCKS = {
    # B, S, D, F, E, K, shared width, groups
    "one_token": (1, 1, 32, 16, 8, 2, 16, 1),
    "decode": (5, 1, 48, 24, 8, 3, 48, 2),
    "one_expert": (2, 3, 16, 8, 1, 1, 8, 1),
    "many_tokens": (2, 200, 32, 16, 8, 3, 16, 4),
    "odd_sizes": (3, 3, 33, 17, 6, 2, 35, 3),
}


@every_form
@DTYPES
@FP8
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("norm_topk_prob", [0, 1])
def test_moe_block(evaluate: Evaluate, dtype: torch.dtype, fp8: bool, block: str, norm_topk_prob: int) -> None:
    B, S, D, F, E, K, shared, n_group = BLOCKS[block]
    x = random(B, S, D, seed=1).to(dtype)
    x[-1] *= 10  # FP8: a scale of its own
    router, bias = random(E, D, seed=2), random(E, seed=3)
    gate_up, down, *mlp = (
        weight(*shape, seed=seed, dtype=dtype, fp8=fp8)
        for seed, shape in enumerate([(E, 2 * F, D), (E, D, F), (shared, D), (shared, D), (D, shared)], start=4)
    )
    attributes = {"top_k": K, "n_group": n_group, "topk_group": (n_group + 1) // 2, "norm_topk_prob": norm_topk_prob}
    attributes |= {"routed_scaling_factor": 2.5}
    prefix = "FP8" if fp8 else ""
    weights = [*gate_up, *down, *(tensor for part in mlp for tensor in part)]
    got = evaluate(f"{prefix}MoEBlock", x, router, bias, *weights, **attributes)

    def linear(x: Tensor, *weight: Tensor) -> Tensor:
        return evaluate(f"{prefix}Linear", x, *weight, None)[0]

    x_TD = x.flatten(0, 1)
    (logits,) = evaluate("Linear", x_TD.float(), router, None)
    routing = evaluate("MoERouter", logits, bias, **attributes)
    (routed,) = evaluate(f"{prefix}MoEExperts", x_TD, *routing, *gate_up, *down)
    (h,) = evaluate("SiluMul", linear(x, *mlp[0]), linear(x, *mlp[1]))
    expect_same(got, evaluate("ResidualAdd", routed.view_as(x), linear(h, *mlp[2])))
