from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from experts_bound import Bounded, choose, exact, random
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

from glm_export.plugins.work import Work

if TYPE_CHECKING:
    from conftest import Evaluate, ExpectClose, RunKernel

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


REGIMES = {
    # tokens, experts, chosen per token, hidden size, width, experts that may be chosen
    "one_token": (1, 8, 2, 32, 16, ()),
    "one_expert": (3, 1, 1, 32, 16, ()),
    "one_choice": (9, 4, 1, 16, 8, ()),
    "every_expert": (5, 4, 4, 24, 12, ()),
    "nobody_chose_most": (6, 8, 2, 32, 16, (0, 6)),
    "many_tokens": (60, 8, 3, 64, 32, ()),
    "all_on_one_expert": (70, 4, 1, 24, 12, (2,)),
    "all_on_the_same": (65, 8, 3, 24, 12, (1, 4, 7)),
    "odd_sizes": (7, 5, 3, 33, 17, ()),
}
regimes = pytest.mark.parametrize("regime", REGIMES)


@DTYPES
@regimes
def test_float64_loop(evaluate: Evaluate, expect_close: ExpectClose, regime: str, dtype: torch.dtype) -> None:
    T, E, K, D, F, among = REGIMES[regime]
    hidden = random(T, D, seed=1).to(dtype)
    ids, weights = choose(T, E, K, among=among)
    gate_up = (random(E, 2 * F, D, seed=2) / D**0.5).to(dtype)
    down = (random(E, D, F, seed=3) / F**0.5).to(dtype)
    (got,) = evaluate("MoEExperts", hidden, ids, weights, gate_up, down)
    assert got.dtype == dtype
    want = exact(hidden, ids, weights, gate_up.double(), down.double(), fp8=False)
    expect_close(got, want.value, want.error)


@DTYPES
@regimes
def test_fp8_float64_loop(evaluate: Evaluate, expect_close: ExpectClose, regime: str, dtype: torch.dtype) -> None:
    T, E, K, D, F, among = REGIMES[regime]
    hidden = random(T, D, seed=1).to(dtype)
    hidden[-1] *= 30  # a scale of its own per token
    ids, weights = choose(T, E, K, among=among)
    gate_up = (random(E, 2 * F, D, seed=2) * 100).to(torch.float8_e4m3fn)
    down = (random(E, D, F, seed=3) * 100).to(torch.float8_e4m3fn)
    gate_up_scale = (random(E, 2 * F, seed=4).abs() + 0.1) / 100 / D**0.5
    down_scale = (random(E, D, seed=5).abs() + 0.1) / 100 / F**0.5
    (got,) = evaluate("FP8MoEExperts", hidden, ids, weights, gate_up, gate_up_scale, down, down_scale)
    assert got.dtype == dtype
    dequantized = (gate_up.double() * gate_up_scale.double()[..., None], down.double() * down_scale.double()[..., None])
    want = exact(hidden, ids, weights, *dequantized, fp8=True)
    expect_close(got, want.value, want.error)


@regimes
@pytest.mark.parametrize("evaluate", ["kernel_scalar", "kernel_avx2"], indirect=True)
def test_kernels_count_the_experts_that_were_chosen(evaluate: Evaluate, regime: str) -> None:
    T, E, K, D, F, among = REGIMES[regime]
    ids, weights = choose(T, E, K, among=among)
    before = Work.so_far()
    evaluate("MoEExperts", random(T, D, seed=1), ids, weights, random(E, 2 * F, D, seed=2), random(E, D, F, seed=3))
    done = Work.so_far() - before
    assert done.experts == len(ids.unique())
    assert done.seconds > 0


@pytest.mark.parametrize("fp8", [False, True])
def test_bound_is_tight(fp8: bool) -> None:
    # What the tests above allow is far less than what they look for: a wrong expert, weight or half moves the
    # result by its own size, a missed quantization by 2^-5 of it.
    ids, weights = choose(60, 8, 3)
    want = exact(
        *(random(60, 64, seed=1), ids, weights),
        *(random(8, 64, 64, seed=2).double() / 8, random(8, 64, 32, seed=3).double() / 6),
        fp8=fp8,
    )
    assert (want.error.square().mean() / want.value.square().mean()).sqrt() < (0.01 if fp8 else 1e-3)


@pytest.mark.parametrize(("E", "K"), [(8, 2), (128, 8), (160, 8)])
def test_transformers(expect_close: ExpectClose, E: int, K: int) -> None:
    T, D, F = 20, 48, 24
    config = transformers.Glm4MoeConfig(hidden_size=D, moe_intermediate_size=F, n_routed_experts=E)
    config._experts_implementation = "eager"
    experts = Glm4MoeExperts(config)
    hidden, (ids, weights) = random(T, D, seed=1), choose(T, E, K)
    gate_up, down = random(E, 2 * F, D, seed=2) / D**0.5, random(E, D, F, seed=3) / F**0.5
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up)
        experts.down_proj.copy_(down)
        theirs = experts(hidden, ids.long(), weights)
    ours = torch.ops.glm.moe_experts(hidden, ids, weights, gate_up, down)
    want = exact(hidden, ids, weights, gate_up.double(), down.double(), fp8=False)
    expect_close(ours, want.value, want.error, "ours")
    expect_close(theirs, want.value, want.error, "transformers")


def test_zero_tokens_give_zero(evaluate: Evaluate) -> None:
    ids, weights = choose(3, 4, 2)
    fp8 = torch.float8_e4m3fn
    gate_up, down = random(4, 16, 8, seed=1).to(fp8), random(4, 8, 8, seed=2).to(fp8)
    (got,) = evaluate(
        "FP8MoEExperts", torch.zeros(3, 8), ids, weights, gate_up, torch.ones(4, 16), down, torch.ones(4, 8)
    )
    assert got.eq(0).all()


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    inputs: dict[str, Tensor]
    want: Bounded

    def check(self, kernel: RunKernel, expect_close: ExpectClose) -> None:
        op = "FP8MoEExperts" if "down_scale" in self.inputs else "MoEExperts"
        (got,) = kernel(op, self.inputs)
        expect_close(got, self.want.value, self.want.error, str([*self.inputs["down"].shape]))


def call(dtype: torch.dtype, ids: Tensor, E: int, D: int, F: int, *, fp8: bool) -> Call:
    hidden = random(len(ids), D, seed=1).to(dtype)
    weights = random(*ids.shape, seed=6).abs()
    gate_up, down = random(E, 2 * F, D, seed=2) / D**0.5, random(E, D, F, seed=3) / F**0.5
    routing = {"hidden": hidden, "expert_ids": ids.int(), "expert_weights": weights}
    if not fp8:
        gate_up, down = gate_up.to(dtype), down.to(dtype)
        want = exact(hidden, ids, weights, gate_up.double(), down.double(), fp8=False)
        return Call(inputs={**routing, "gate_up": gate_up, "down": down}, want=want)
    scales = {"gate_up": random(E, 2 * F, seed=4).abs() / 100 + 1e-3, "down": random(E, D, seed=5).abs() / 100 + 1e-3}
    values = {"gate_up": (gate_up * 100).to(torch.float8_e4m3fn), "down": (down * 100).to(torch.float8_e4m3fn)}
    dequantized = [values[name].double() * scales[name].double()[..., None] for name in values]
    inputs = {name: x for w in values for name, x in ((w, values[w]), (f"{w}_scale", scales[w]))}
    return Call(inputs={**routing, **inputs}, want=exact(hidden, ids, weights, *dequantized, fp8=True))


@functools.cache
def tile_borders(dtype: torch.dtype, fp8: bool) -> Call:
    # As many tokens for each expert as there may be on either side of a tile's border.
    counts = [*range(10), 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 64, 65, 200]
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    return call(dtype, ids[:, None], len(counts), 33, 17, fp8=fp8)


@functools.cache
def vector_borders(dtype: torch.dtype, fp8: bool) -> list[Call]:
    few = [(n, n + 2) for n in range(1, 18)]
    more = [(31, 33), (33, 31), (64, 63), (65, 64), (63, 65), (127, 129), (129, 511), (513, 65), (1030, 17), (17, 1030)]
    ids = torch.tensor([[0, 2], [2, 1], [1, 2], [2, 0]])
    return [call(dtype, ids, 3, D, F, fp8=fp8) for D, F in few + more]


@DTYPES
@pytest.mark.parametrize("fp8", [False, True])
def test_tile_borders(kernel: RunKernel, expect_close: ExpectClose, dtype: torch.dtype, fp8: bool) -> None:
    tile_borders(dtype, fp8).check(kernel, expect_close)


@DTYPES
@pytest.mark.parametrize("fp8", [False, True])
def test_vector_borders(kernel: RunKernel, expect_close: ExpectClose, dtype: torch.dtype, fp8: bool) -> None:
    for each in vector_borders(dtype, fp8):
        each.check(kernel, expect_close)
