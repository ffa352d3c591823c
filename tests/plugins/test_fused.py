"""The fused ops are the ops they stand for, bit for bit, in every form; how good those are is told elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cpu_tools
import pytest
import torch
from experts_bound import random
from torch import Tensor

from glm_export.plugins.finite import finite_logits

if TYPE_CHECKING:
    from conftest import Evaluate, RunKernel

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


ATTENTIONS = {
    # B, S, H, J, A, D, C, rotary dimension
    "smallest": (1, 1, 1, 1, 8, 16, 4, 4),
    "decode": (3, 1, 6, 2, 16, 40, 9, 8),
    "many_tokens": (2, 130, 4, 2, 8, 24, 140, 8),
    "odd_sizes": (2, 7, 3, 1, 10, 33, 11, 2),
}


@every_form
@DTYPES
@FP8
@pytest.mark.parametrize("block", ATTENTIONS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_attention_block(evaluate: Evaluate, dtype: torch.dtype, fp8: bool, block: str, biased: bool) -> None:
    B, S, H, J, A, D, C, rotary_dim = ATTENTIONS[block]
    q, k, v = (random(B, S, heads, A, seed=seed).to(dtype) for seed, heads in enumerate((H, J, J)))
    cos, sin = random(B, S, rotary_dim // 2, seed=3), random(B, S, rotary_dim // 2, seed=4)
    caches = [random(B, J, C, A, seed=seed).to(dtype) for seed in (5, 6)]
    write_index = torch.arange(B) % (C - S + 1)
    step = (q, k, v, cos, sin, *caches, write_index, write_index + S)
    o, bias = weight(D, H * A, seed=7, dtype=dtype, fp8=fp8), random(D, seed=8) if biased else None
    residual, norm = random(B, S, D, seed=9).to(dtype), random(D, seed=10)
    attributes = {"rotary_dim": rotary_dim, "scale": A**-0.5}
    prefix = "FP8" if fp8 else ""
    got = evaluate(f"{prefix}AttentionBlock", *step, *o, bias, residual, norm, **attributes, epsilon=EPSILON)

    out, *caches = evaluate("CachedAttention", *step, outputs=3, **attributes)
    (update,) = evaluate(f"{prefix}Linear", out.flatten(-2), *o, bias)
    expect_same(got, [*sum_and_norm(evaluate, residual, update, norm), *caches])


def sum_and_norm(evaluate: Evaluate, residual: Tensor, update: Tensor, norm: Tensor) -> list[Tensor]:
    (total,) = evaluate("ResidualAdd", residual, update)
    return [total, *evaluate("RMSNorm", total, norm, epsilon=EPSILON)]


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
    residual, norm = random(B, S, D, seed=9).to(dtype), random(D, seed=10)
    block_attributes = {**attributes, "epsilon": EPSILON}
    got = evaluate(f"{prefix}MoEBlock", x, router, bias, *weights, residual, norm, **block_attributes)

    def linear(x: Tensor, *weight: Tensor) -> Tensor:
        return evaluate(f"{prefix}Linear", x, *weight, None)[0]

    x_TD = x.flatten(0, 1)
    (logits,) = evaluate("Linear", x_TD.float(), router, None)
    routing = evaluate("MoERouter", logits, bias, **attributes)
    (routed,) = evaluate(f"{prefix}MoEExperts", x_TD, *routing, *gate_up, *down)
    (h,) = evaluate("SiluMul", linear(x, *mlp[0]), linear(x, *mlp[1]))
    (update,) = evaluate("ResidualAdd", routed.view_as(x), linear(h, *mlp[2]))
    expect_same(got, sum_and_norm(evaluate, residual, update, norm))


@every_form
@DTYPES
@FP8
@pytest.mark.parametrize(("B", "D", "V"), [(1, 16, 8), (3, 40, 61), (2, 33, 9001)], ids=str)
def test_logits(evaluate: Evaluate, dtype: torch.dtype, fp8: bool, B: int, D: int, V: int) -> None:
    x = random(B, 1, D, seed=1).to(dtype)
    head = weight(V, D, seed=2, dtype=dtype, fp8=fp8)
    prefix = "FP8" if fp8 else ""
    (want,) = evaluate(f"{prefix}Linear", x.float(), *head, None)
    expect_same(evaluate(f"{prefix}Logits", x, *head), [want.squeeze(1)])


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, None], ids=str)
@FP8
def test_logits_that_are_not_finite_are_found(kernel: RunKernel, bad: float | None, fp8: bool) -> None:
    B, V = 2, 9001  # more than one thread's part
    names = ("weight", "weight_scale") if fp8 else ("weight",)
    largest = torch.finfo(torch.float32).max
    for row in (0, 1, 4499, 4500, 9000):
        x = torch.ones(B, 1, 8)
        head = weight(V, 8, seed=1, dtype=torch.float32, fp8=fp8)
        head[-1][row] = largest if bad is None else bad
        if bad is None:  # 8 such weights are summed, or one such scale multiplies 448
            x /= 4096
        found = finite_logits(cpu_tools.library_for(kernel.isa))
        found[0] = 1
        kernel("FP8Logits" if fp8 else "Logits", {"x": x, **dict(zip(names, head, strict=True))}, threads=2)
        assert (found[0] > 1) == (bad is None)
