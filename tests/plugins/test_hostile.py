"""What no bundle has but a node may be given: a CPU kernel answers with a sentence or with the right result.

`make sanitize` runs this with the sanitizers, which see what a wrong size makes a kernel read or write.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch
from experts_bound import exact
from torch import Tensor

if TYPE_CHECKING:
    from conftest import ExpectClose, RunKernel

FP8 = torch.float8_e4m3fn
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
HUGE = 2**40
"""A size that no machine has room for, as long as another one is not zero."""


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def valid(op: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Inputs and attributes that the op takes: T=3, D=8, F=6, E=4, K=2; I=8, O=5; B=2, S=3, H=4, J=2, A=8, C=7."""
    routing = {
        "hidden": random(3, 8),
        "expert_ids": ids([0, 3], [3, 1], [2, 0]),
        "expert_weights": random(3, 2),
    }
    attention = {
        **{"q": random(2, 3, 4, 8), "k": random(2, 3, 2, 8), "v": random(2, 3, 2, 8)},
        **{"cos": random(2, 3, 2), "sin": random(2, 3, 2)},
        **{"k_cache": random(2, 2, 7, 8), "v_cache": random(2, 2, 7, 8)},
        **{"write_index": torch.tensor([0, 2]), "length": torch.tensor([3, 5])},
    }
    residual = {"residual": random(2, 3, 8), "norm_weight": random(8)}
    inputs: dict[str, dict[str, Tensor]] = {
        "RMSNorm": {"x": random(2, 3, 8), "weight": random(8)},
        "SiluMul": {"gate": random(2, 3, 8), "up": random(2, 3, 8)},
        "ResidualAdd": {"x": random(2, 3, 8), "update": random(2, 3, 8)},
        "Linear": {"x": random(2, 3, 8), "weight": random(5, 8), "bias": random(5)},
        "FP8Linear": {
            "x": random(2, 3, 8),
            "weight": random(5, 8).to(FP8),
            "weight_scale": random(5),
            "bias": random(5),
        },
        "QkvLinear": {
            **{"x": random(2, 3, 8), "q_weight": random(8, 8), "q_bias": random(8)},
            **{"k_weight": random(4, 8), "k_bias": random(4), "v_weight": random(4, 8), "v_bias": random(4)},
        },
        "FP8QkvLinear": {
            **{"x": random(2, 3, 8), "q_weight": random(8, 8).to(FP8), "q_scale": random(8), "q_bias": random(8)},
            **{"k_weight": random(4, 8).to(FP8), "k_scale": random(4), "k_bias": random(4)},
            **{"v_weight": random(4, 8).to(FP8), "v_scale": random(4), "v_bias": random(4)},
        },
        "MoEBlock": {
            **{"x": random(2, 3, 8), "router_weight": random(4, 8), "correction_bias": random(4)},
            **{"gate_up": random(4, 12, 8), "down": random(4, 8, 6)},
            **{"shared_gate": random(7, 8), "shared_up": random(7, 8), "shared_down": random(8, 7)},
            **residual,
        },
        "FP8MoEBlock": {
            **{"x": random(2, 3, 8), "router_weight": random(4, 8), "correction_bias": random(4)},
            **{"gate_up": random(4, 12, 8).to(FP8), "gate_up_scale": random(4, 12)},
            **{"down": random(4, 8, 6).to(FP8), "down_scale": random(4, 8)},
            **{"shared_gate": random(7, 8).to(FP8), "shared_gate_scale": random(7)},
            **{"shared_up": random(7, 8).to(FP8), "shared_up_scale": random(7)},
            **{"shared_down": random(8, 7).to(FP8), "shared_down_scale": random(8)},
            **residual,
        },
        "Logits": {"x": random(2, 1, 8), "weight": random(5, 8)},
        "FP8Logits": {"x": random(2, 1, 8), "weight": random(5, 8).to(FP8), "weight_scale": random(5)},
        "MoERouter": {"logits": random(3, 8), "correction_bias": random(8)},
        "MoEExperts": {**routing, "gate_up": random(4, 12, 8), "down": random(4, 8, 6)},
        "FP8MoEExperts": {
            **routing,
            "gate_up": random(4, 12, 8).to(FP8),
            "gate_up_scale": random(4, 12),
            "down": random(4, 8, 6).to(FP8),
            "down_scale": random(4, 8),
        },
        "CachedAttention": attention,
        "AttentionBlock": {**attention, "o_weight": random(8, 32), "o_bias": random(8), **residual},
        "FP8AttentionBlock": {
            **{**attention, "o_weight": random(8, 32).to(FP8), "o_scale": random(8), "o_bias": random(8)},
            **residual,
        },
    }
    routes = {"top_k": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": 1, "routed_scaling_factor": 2.5}
    attributes: dict[str, dict[str, float]] = {
        "RMSNorm": {"epsilon": 1e-5},
        **{name: {"head_size": 4} for name in ("QkvLinear", "FP8QkvLinear")},
        "MoERouter": routes,
        **{name: {**routes, "epsilon": 1e-5} for name in ("MoEBlock", "FP8MoEBlock")},
        "CachedAttention": {"rotary_dim": 4, "scale": 0.35},
        **{name: {"rotary_dim": 4, "scale": 0.35, "epsilon": 1e-5} for name in ("AttentionBlock", "FP8AttentionBlock")},
    }
    return inputs[op], attributes.get(op, {})


OPS = ("RMSNorm", "SiluMul", "ResidualAdd", "Linear", "FP8Linear", "MoERouter", "MoEExperts", "FP8MoEExperts")
OPS += ("CachedAttention", "QkvLinear", "FP8QkvLinear", "AttentionBlock", "FP8AttentionBlock")
OPS += ("MoEBlock", "FP8MoEBlock", "Logits", "FP8Logits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A valid call of each of these ops, but for some operands, and what it is told."""

    ops: str
    says: str
    inputs: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of inputs that are all zero, in their own dtype."""
    attributes: dict[str, float] = field(default_factory=dict)


def shapes(ops: str, says: str, **shapes: tuple[int, ...]) -> Refused:
    return Refused(ops=ops, says=says, shapes=shapes)


def expert_id(e: int) -> Refused:
    says = f"expert id {e} is out of range: there are 4 experts."
    return Refused(ops="MoEExperts FP8MoEExperts", says=says, inputs={"expert_ids": ids([0, 3], [3, e], [2, 0])})


def router(says: str, **attributes: float) -> Refused:
    return Refused(ops="MoERouter", says=says, attributes=attributes)


WEIGHTS = "expected [1 or more, 1 or more, 1 or more]"
ROWS = "rows of a weight: head_size = 4 must divide them."
LINEAR, EXPERTS = "Linear FP8Linear", "MoEExperts FP8MoEExperts"
LOGITS, ATTENTION = "Logits FP8Logits", "AttentionBlock FP8AttentionBlock"
QKV, BLOCK = "QkvLinear FP8QkvLinear", "MoEBlock FP8MoEBlock"
RANKS = [
    shapes("RMSNorm", "x is [], expected [..., 8].", x=()),
    shapes("RMSNorm", "weight is [], expected [1 or more].", weight=()),
    shapes("RMSNorm", "weight is [1, 8], expected [1 or more].", weight=(1, 8)),
    shapes("SiluMul", "up is [], expected [2, 3, 8].", up=()),
    shapes("SiluMul", "up is [6, 8], expected [2, 3, 8].", up=(6, 8)),
    shapes("ResidualAdd", "update is [8], expected [2, 3, 8].", update=(8,)),
    shapes("ResidualAdd", "update is [1, 2, 3, 8], expected [2, 3, 8].", update=(1, 2, 3, 8)),
    shapes(LINEAR, "x is [], expected [..., 8].", x=()),
    shapes(LINEAR, "weight is [], expected [1 or more, 1 or more].", weight=()),
    shapes(LINEAR, "weight is [40], expected [1 or more, 1 or more].", weight=(40,)),
    shapes(LINEAR, "weight is [5, 8, 1], expected [1 or more, 1 or more].", weight=(5, 8, 1)),
    shapes(LINEAR, "bias is [], expected [5].", bias=()),
    shapes(LINEAR, "bias is [1, 5], expected [5].", bias=(1, 5)),
    shapes("FP8Linear", "weight_scale is [5, 1], expected [5].", weight_scale=(5, 1)),
    shapes("MoERouter", "logits is [], expected [any, any].", logits=()),
    shapes("MoERouter", "logits is [1, 3, 8], expected [any, any].", logits=(1, 3, 8)),
    shapes("MoERouter", "correction_bias is [1, 8], expected [8].", correction_bias=(1, 8)),
    shapes(EXPERTS, "hidden is [], expected [any, 8].", hidden=()),
    shapes(EXPERTS, "hidden is [1, 3, 8], expected [any, 8].", hidden=(1, 3, 8)),
    shapes(EXPERTS, "expert_ids is [3], expected [3, 1 or more].", expert_ids=(3,)),
    shapes(EXPERTS, "expert_weights is [6], expected [3, 2].", expert_weights=(6,)),
    shapes(EXPERTS, "gate_up is [48, 8], expected [4, 12, 8].", gate_up=(48, 8)),
    shapes(EXPERTS, "gate_up is [2, 2, 12, 8], expected [4, 12, 8].", gate_up=(2, 2, 12, 8)),
    shapes(EXPERTS, f"down is [], {WEIGHTS}.", down=()),
    shapes(EXPERTS, f"down is [32, 6], {WEIGHTS}.", down=(32, 6)),
    shapes("FP8MoEExperts", "gate_up_scale is [4, 12, 1], expected [4, 12].", gate_up_scale=(4, 12, 1)),
    shapes("FP8MoEExperts", "down_scale is [32], expected [4, 8].", down_scale=(32,)),
    shapes("CachedAttention", "q is [], expected [any, any, 1 or more, 1 or more].", q=()),
    shapes("CachedAttention", "q is [2, 3, 32], expected [any, any, 1 or more, 1 or more].", q=(2, 3, 32)),
    shapes("CachedAttention", "k is [2, 3, 16], expected [2, 3, 2, 8].", k=(2, 3, 16)),
    shapes("CachedAttention", "v is [], expected [2, 3, 2, 8].", v=()),
    shapes("CachedAttention", "cos is [6, 2], expected [2, 3, 2].", cos=(6, 2)),
    shapes("CachedAttention", "sin is [1, 2, 3, 2], expected [2, 3, 2].", sin=(1, 2, 3, 2)),
    shapes("CachedAttention", "k_cache is [2, 2, 56], expected [2, 1 or more, 1 or more, 8].", k_cache=(2, 2, 56)),
    shapes("CachedAttention", "v_cache is [2, 14, 8], expected [2, 2, 7, 8].", v_cache=(2, 14, 8)),
    shapes("CachedAttention", "write_index is [], expected [2].", write_index=()),
    shapes("CachedAttention", "length is [2, 1], expected [2].", length=(2, 1)),
    shapes(ATTENTION, "k is [2, 3, 16], expected [2, 3, 2, 8].", k=(2, 3, 16)),
    shapes(ATTENTION, "o_weight is [256], expected [1 or more, 32].", o_weight=(256,)),
    shapes(ATTENTION, "residual is [6, 8], expected [2, 3, 8].", residual=(6, 8)),
    shapes(ATTENTION, "norm_weight is [1, 8], expected [8].", norm_weight=(1, 8)),
    shapes(BLOCK, "residual is [6, 8], expected [2, 3, 8].", residual=(6, 8)),
    shapes(BLOCK, "norm_weight is [], expected [8].", norm_weight=()),
    shapes(QKV, "x is [6, 8], expected [any, any, 8].", x=(6, 8)),
    shapes(QKV, "q_weight is [8], expected [1 or more, 1 or more].", q_weight=(8,)),
    shapes(QKV, "v_weight is [4, 8, 1], expected [1 or more, 8].", v_weight=(4, 8, 1)),
    shapes(QKV, "k_bias is [], expected [4].", k_bias=()),
    shapes(BLOCK, "x is [], expected [..., 8].", x=()),
    shapes(BLOCK, "router_weight is [32], expected [1 or more, 1 or more].", router_weight=(32,)),
    shapes(BLOCK, "gate_up is [48, 8], expected [4, 1 or more, 8].", gate_up=(48, 8)),
    shapes(BLOCK, "shared_down is [56], expected [8, 7].", shared_down=(56,)),
    shapes(LOGITS, "x is [2, 8], expected [any, 1, 8].", x=(2, 8)),
    shapes(LOGITS, "weight is [8], expected [1 or more, 1 or more].", weight=(8,)),
    shapes("FP8Logits", "weight_scale is [5, 1], expected [5].", weight_scale=(5, 1)),
]
SIZES = [
    shapes("RMSNorm", "x is [2, 3, 7], expected [..., 8].", x=(2, 3, 7)),
    shapes("SiluMul", "up is [2, 3, 9], expected [2, 3, 8].", up=(2, 3, 9)),
    shapes("ResidualAdd", "update is [2, 3, 1], expected [2, 3, 8].", update=(2, 3, 1)),
    shapes(LINEAR, "x is [2, 3, 9], expected [..., 8].", x=(2, 3, 9)),
    shapes(LINEAR, "bias is [4], expected [5].", bias=(4,)),
    shapes(LINEAR, "bias is [6], expected [5].", bias=(6,)),
    shapes("FP8Linear", "weight_scale is [1], expected [5].", weight_scale=(1,)),
    shapes("MoERouter", "correction_bias is [7], expected [8].", correction_bias=(7,)),
    shapes(EXPERTS, "hidden is [3, 7], expected [any, 8].", hidden=(3, 7)),
    shapes(EXPERTS, "expert_ids is [2, 2], expected [3, 1 or more].", expert_ids=(2, 2)),
    shapes(EXPERTS, "expert_weights is [3, 1], expected [3, 2].", expert_weights=(3, 1)),
    shapes(EXPERTS, "gate_up is [3, 12, 8], expected [4, 12, 8].", gate_up=(3, 12, 8)),
    shapes(EXPERTS, "gate_up is [4, 13, 8], expected [4, 12, 8].", gate_up=(4, 13, 8)),
    shapes(EXPERTS, "gate_up is [4, 6, 8], expected [4, 12, 8].", gate_up=(4, 6, 8)),
    shapes(EXPERTS, "gate_up is [4, 12, 7], expected [4, 12, 8].", gate_up=(4, 12, 7)),
    shapes(EXPERTS, "gate_up is [4, 12, 8], expected [5, 12, 8].", down=(5, 8, 6)),
    shapes(EXPERTS, "gate_up is [4, 12, 8], expected [4, 24, 8].", down=(4, 8, 12)),
    shapes("FP8MoEExperts", "gate_up_scale is [4, 6], expected [4, 12].", gate_up_scale=(4, 6)),
    shapes("FP8MoEExperts", "down_scale is [4, 6], expected [4, 8].", down_scale=(4, 6)),
    shapes("CachedAttention", "k is [2, 2, 2, 8], expected [2, 3, 2, 8].", k=(2, 2, 2, 8)),
    shapes("CachedAttention", "v is [2, 3, 2, 7], expected [2, 3, 2, 8].", v=(2, 3, 2, 7)),
    shapes("CachedAttention", "cos is [2, 3, 4], expected [2, 3, 2].", cos=(2, 3, 4)),
    shapes("CachedAttention", "k_cache is [1, 2, 7, 8], expected [2, 1 or more, 1 or more, 8].", k_cache=(1, 2, 7, 8)),
    shapes("CachedAttention", "v_cache is [2, 2, 6, 8], expected [2, 2, 7, 8].", v_cache=(2, 2, 6, 8)),
    shapes("CachedAttention", "write_index is [1], expected [2].", write_index=(1,)),
    shapes("CachedAttention", "length is [3], expected [2].", length=(3,)),
    shapes(ATTENTION, "o_weight is [8, 31], expected [1 or more, 32].", o_weight=(8, 31)),
    shapes("FP8AttentionBlock", "o_scale is [7], expected [8].", o_scale=(7,)),
    shapes(ATTENTION, "o_bias is [7], expected [8].", o_bias=(7,)),
    shapes(ATTENTION, "residual is [2, 3, 7], expected [2, 3, 8].", residual=(2, 3, 7)),
    shapes(ATTENTION, "norm_weight is [7], expected [8].", norm_weight=(7,)),
    shapes(BLOCK, "residual is [2, 2, 8], expected [2, 3, 8].", residual=(2, 2, 8)),
    shapes(BLOCK, "norm_weight is [9], expected [8].", norm_weight=(9,)),
    shapes(LOGITS, "x is [2, 2, 8], expected [any, 1, 8].", x=(2, 2, 8)),
    shapes(LOGITS, "x is [2, 1, 7], expected [any, 1, 8].", x=(2, 1, 7)),
    shapes("FP8Logits", "weight_scale is [4], expected [5].", weight_scale=(4,)),
    shapes(QKV, "x is [2, 3, 7], expected [any, any, 8].", x=(2, 3, 7)),
    shapes(QKV, "k_weight is [4, 7], expected [1 or more, 8].", k_weight=(4, 7)),
    shapes(QKV, "v_bias is [8], expected [4].", v_bias=(8,)),
    shapes("FP8QkvLinear", "q_scale is [4], expected [8].", q_scale=(4,)),
    shapes("QkvLinear", f"there are 6 {ROWS}", k_weight=(6, 8), k_bias=(6,)),
    shapes(BLOCK, "x is [2, 3, 9], expected [..., 8].", x=(2, 3, 9)),
    shapes(BLOCK, "correction_bias is [5], expected [4].", correction_bias=(5,)),
    shapes(BLOCK, "gate_up is [5, 12, 8], expected [4, 1 or more, 8].", gate_up=(5, 12, 8)),
    shapes(BLOCK, "gate_up is [4, 13, 8], expected [4, 12, 8].", gate_up=(4, 13, 8)),
    shapes(BLOCK, "gate_up is [4, 1, 8], expected [4, 0, 8].", gate_up=(4, 1, 8)),
    shapes(BLOCK, "down is [4, 8, 5], expected [4, 8, 6].", down=(4, 8, 5)),
    shapes(BLOCK, "shared_gate is [7, 9], expected [1 or more, 8].", shared_gate=(7, 9)),
    shapes(BLOCK, "shared_up is [6, 8], expected [7, 8].", shared_up=(6, 8)),
    shapes(BLOCK, "shared_down is [7, 8], expected [8, 7].", shared_down=(7, 8)),
    shapes("FP8MoEBlock", "gate_up_scale is [4, 6], expected [4, 12].", gate_up_scale=(4, 6)),
    shapes("FP8MoEBlock", "shared_up_scale is [8], expected [7].", shared_up_scale=(8,)),
    shapes("FP8MoEBlock", "shared_down_scale is [7], expected [8].", shared_down_scale=(7,)),
]
# Only the number of tokens may be zero. A size that is not in memory, because another one is zero, is no loop's bound.
EMPTY = [
    shapes("RMSNorm", "weight is [0], expected [1 or more].", x=(2, 0), weight=(0,)),
    shapes("RMSNorm", "weight is [0], expected [1 or more].", x=(HUGE, 0), weight=(0,)),
    shapes(LINEAR, "weight is [0, 8], expected [1 or more, 1 or more].", weight=(0, 8)),
    shapes(LINEAR, "weight is [5, 0], expected [1 or more, 1 or more].", x=(2, 0), weight=(5, 0)),
    shapes(LINEAR, f"weight is [{HUGE}, 0], expected [1 or more, 1 or more].", x=(HUGE, 0), weight=(HUGE, 0)),
    shapes(LINEAR, f"x is [{HUGE}, 0], expected [..., 8].", x=(HUGE, 0)),
    shapes(
        "MoERouter",
        "there are 0 experts: n_group = 2 must divide them and top_k = 2 not exceed them.",
        **{"logits": (3, 0), "correction_bias": (0,)},
    ),
    shapes(EXPERTS, f"down is [0, 8, 6], {WEIGHTS}.", gate_up=(0, 12, 8), down=(0, 8, 6)),
    shapes(EXPERTS, f"down is [4, 0, 6], {WEIGHTS}.", hidden=(3, 0), down=(4, 0, 6)),
    shapes(EXPERTS, f"down is [4, 8, 0], {WEIGHTS}.", gate_up=(4, 0, 8), down=(4, 8, 0)),
    shapes(EXPERTS, "expert_ids is [3, 0], expected [3, 1 or more].", expert_ids=(3, 0), expert_weights=(3, 0)),
    shapes(EXPERTS, f"down is [0, 8, {2**57}], {WEIGHTS}.", down=(0, 8, 2**57)),
]
EXPERT_IDS = [expert_id(e) for e in (4, -1, 5, 1 << 20, INT32_MAX, INT32_MIN)]
ATTRIBUTES = [
    Refused(ops=QKV, says="head_size is 0, expected 1 or more.", attributes={"head_size": 0}),
    Refused(ops=QKV, says=f"head_size is {-(2**63)}, expected 1 or more.", attributes={"head_size": -(2**63)}),
    Refused(ops=QKV, says=f"there are 8 {ROWS}".replace("4", "3"), attributes={"head_size": 3}),
    Refused(ops=BLOCK, says="top_k is 0, expected 1 or more.", attributes={"top_k": 0}),
    Refused(ops=BLOCK, says="topk_group is 1, expected 1 to n_group = 0.", attributes={"n_group": 0}),
    Refused(
        ops=BLOCK,
        says="there are 4 experts: n_group = 3 must divide them and top_k = 2 not exceed them.",
        attributes={"n_group": 3},
    ),
    router("top_k is 0, expected 1 or more.", top_k=0),
    router("top_k is -1, expected 1 or more.", top_k=-1),
    router(f"top_k is {-(2**63)}, expected 1 or more.", top_k=-(2**63)),
    router("there are 8 experts: n_group = 2 must divide them and top_k = 9 not exceed them.", top_k=9),
    router(f"there are 8 experts: n_group = 2 must divide them and top_k = {2**62} not exceed them.", top_k=2**62),
    router("there are 8 experts: n_group = 3 must divide them and top_k = 2 not exceed them.", n_group=3),
    router("there are 8 experts: n_group = 16 must divide them and top_k = 2 not exceed them.", n_group=16),
    router("topk_group is 1, expected 1 to n_group = 0.", n_group=0),
    router("topk_group is 1, expected 1 to n_group = -2.", n_group=-2),
    router("topk_group is 3, expected 1 to n_group = 2.", topk_group=3),
    router("topk_group is 0, expected 1 to n_group = 2.", topk_group=0),
    router("topk_group is -1, expected 1 to n_group = 2.", topk_group=-1),
    router(f"topk_group is {2**63 - 1}, expected 1 to n_group = 2.", topk_group=2**63 - 1),
]


def name_of(case: Refused) -> str:
    return f"{case.ops}: {case.says}".replace(" ", "_")


@pytest.mark.parametrize("case", [*RANKS, *SIZES, *EMPTY, *EXPERT_IDS, *ATTRIBUTES], ids=name_of)
def test_refused(kernel: RunKernel, case: Refused) -> None:
    for op in case.ops.split():
        inputs, attributes = valid(op)
        made = {name: torch.zeros(shape, dtype=inputs[name].dtype) for name, shape in case.shapes.items()}
        with pytest.raises(Exception, match=re.escape(f"{op}: {case.says}") + "$"):
            kernel(op, inputs | case.inputs | made, **attributes | case.attributes)


@pytest.mark.parametrize("op", OPS)
def test_inputs_left_out(kernel: RunKernel, op: str) -> None:
    inputs, attributes = valid(op)
    for i, name in enumerate(inputs):
        if name in ("bias", "q_bias", "k_bias", "v_bias", "o_bias"):
            kernel(op, inputs | {name: None}, **attributes)
            continue
        with pytest.raises(Exception, match=rf"{op}.*input {i} is marked single but has an empty string"):
            kernel(op, inputs | {name: None}, **attributes)
    with pytest.raises(Exception, match=rf"{op}.*has input size {len(inputs) + 1}"):
        kernel(op, inputs | {"another": torch.zeros(1)}, **attributes)


@pytest.mark.parametrize("op", ["RMSNorm", "QkvLinear", "MoERouter", "MoEBlock", "CachedAttention", "AttentionBlock"])
def test_attributes_left_out_or_of_the_wrong_kind(kernel: RunKernel, op: str) -> None:
    inputs, attributes = valid(op)
    for name, value in attributes.items():
        kind, other = ("an integer", 1.5) if isinstance(value, int) else ("a float", 1)
        says = f"{op}: {name} is not there as {kind}: "
        with pytest.raises(Exception, match=says):
            kernel(op, inputs, **{a: v for a, v in attributes.items() if a != name})
        with pytest.raises(Exception, match=says):
            kernel(op, inputs, **attributes | {name: other})


NO_QUERIES = {"q": (2, 0, 4, 8), "k": (2, 0, 2, 8), "v": (2, 0, 2, 8), "cos": (2, 0, 2), "sin": (2, 0, 2)}
NO_TOKENS = {
    "RMSNorm": ({"x": (0, 8)}, [(0, 8)]),
    "SiluMul": ({"gate": (2, 0), "up": (2, 0)}, [(2, 0)]),
    "ResidualAdd": ({"x": (2, 0, 8), "update": (2, 0, 8)}, [(2, 0, 8)]),
    "Linear": ({"x": (2, 0, 8)}, [(2, 0, 5)]),
    "FP8Linear": ({"x": (0, 8)}, [(0, 5)]),
    "MoERouter": ({"logits": (0, 8)}, [(0, 2), (0, 2)]),
    **{name: ({"x": (2, 0, 8)}, [(2, 0, 2, 4), (2, 0, 1, 4), (2, 0, 1, 4)]) for name in ("QkvLinear", "FP8QkvLinear")},
    **{name: ({"x": (2, 0, 8), "residual": (2, 0, 8)}, [(2, 0, 8)] * 2) for name in ("MoEBlock", "FP8MoEBlock")},
    **{name: ({"x": (0, 1, 8)}, [(0, 5)]) for name in ("Logits", "FP8Logits")},
    "MoEExperts": ({"hidden": (0, 8), "expert_ids": (0, 2), "expert_weights": (0, 2)}, [(0, 8)]),
    "FP8MoEExperts": ({"hidden": (0, 8), "expert_ids": (0, 2), "expert_weights": (0, 2)}, [(0, 8)]),
    "CachedAttention": (NO_QUERIES, [(2, 0, 4, 8), (2, 2, 7, 8), (2, 2, 7, 8)]),
    **{
        name: ({**NO_QUERIES, "residual": (2, 0, 8)}, [(2, 0, 8), (2, 0, 8), (2, 2, 7, 8), (2, 2, 7, 8)])
        for name in ("AttentionBlock", "FP8AttentionBlock")
    },
}
# ONNX Runtime takes them, and numpy too; a loop over all rows would not end.
NO_TOKENS_OF_MANY = {
    "RMSNorm": ({"x": (HUGE, 0, 8)}, [(HUGE, 0, 8)]),
    **{
        name: ({"x": (HUGE, 0, 8), "residual": (HUGE, 0, 8)}, [(HUGE, 0, 8)] * 2)
        for name in ("MoEBlock", "FP8MoEBlock")
    },
    "QkvLinear": ({"x": (HUGE, 0, 8)}, [(HUGE, 0, 2, 4), (HUGE, 0, 1, 4), (HUGE, 0, 1, 4)]),
    **{name: ({"x": (HUGE, 0, 8)}, [(HUGE, 0, 5)]) for name in ("Linear", "FP8Linear")},
    "SiluMul": ({"gate": (HUGE, 0), "up": (HUGE, 0)}, [(HUGE, 0)]),
    "ResidualAdd": ({"x": (0, HUGE), "update": (0, HUGE)}, [(0, HUGE)]),
}


@pytest.mark.parametrize(
    ("op", "shapes", "want"), [(op, *sizes) for table in (NO_TOKENS, NO_TOKENS_OF_MANY) for op, sizes in table.items()]
)
def test_no_tokens(kernel: RunKernel, op: str, shapes: dict[str, tuple[int, ...]], want: list[tuple[int, ...]]) -> None:
    inputs, attributes = valid(op)
    made = {name: torch.zeros(shape, dtype=inputs[name].dtype) for name, shape in shapes.items()}
    assert [tuple(x.shape) for x in kernel(op, inputs | made, **attributes)] == want


@pytest.mark.parametrize("op", OPS)
def test_inputs_start_anywhere(kernel: RunKernel, op: str) -> None:
    # A safetensors file may put a tensor at any multiple of its element's size.
    inputs, attributes = valid(op)
    moved = {}
    for name, x in inputs.items():
        moved[name] = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        assert moved[name].data_ptr() % (2 * x.itemsize)
    for got, want in zip(kernel(op, moved, **attributes), kernel(op, inputs, **attributes), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("fp8", [False, True])
def test_an_expert_chosen_twice_counts_twice(kernel: RunKernel, expect_close: ExpectClose, fp8: bool) -> None:
    inputs, _ = valid("FP8MoEExperts" if fp8 else "MoEExperts")
    inputs |= {"expert_ids": ids([3, 3], [1, 1], [0, 2])}
    (got,) = kernel("FP8MoEExperts" if fp8 else "MoEExperts", inputs)
    gate_up, down = inputs["gate_up"].double(), inputs["down"].double()
    if fp8:
        gate_up, down = (
            gate_up * inputs["gate_up_scale"].double()[..., None],
            down * inputs["down_scale"].double()[..., None],
        )
    want = exact(inputs["hidden"], inputs["expert_ids"], inputs["expert_weights"], gate_up, down, fp8=fp8)
    expect_close(got, want.value, want.error)


def test_infinite_logits(kernel: RunKernel) -> None:
    inputs, attributes = valid("MoERouter")
    inputs["logits"][0, 5], inputs["logits"][1, 2] = float("inf"), float("-inf")
    inputs["logits"][2] = float("-inf")
    ids, weights = kernel("MoERouter", inputs, **attributes)
    want_ids, want_weights = torch.ops.glm.moe_router(*inputs.values(), *attributes.values())
    assert torch.equal(ids, want_ids)
    # The sigmoid of the smallest number is 0 there and 2^-128 here, which is all that is left to divide in token 2.
    torch.testing.assert_close(weights[:2], want_weights[:2], rtol=16 * 2.0**-24, atol=0)
    assert weights[2].abs().max() < 1e-15


NOT_A_NUMBER = {"quiet": 0x7FC0, "negative": 0xFFC0, "all_ones": 0x7FFF}
"""The upper halves of float32, which are bfloat16."""


@pytest.mark.parametrize("op", ["RMSNorm", "Linear", "FP8Linear", "MoEExperts", "FP8MoEExperts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", NOT_A_NUMBER.values(), ids=NOT_A_NUMBER)
def test_nan_stays_in_its_row_and_is_not_lost(kernel: RunKernel, op: str, dtype: torch.dtype, bits: int) -> None:
    inputs, attributes = valid(op)
    name = "hidden" if "Experts" in op else "x"
    inputs |= {x: inputs[x].to(dtype) for x in (name, "gate_up", "down") if x in inputs and inputs[x].dtype != FP8}
    (clean,) = kernel(op, inputs, **attributes)
    dirty = inputs[name].clone()
    dirty.view(-1, 8)[1, 3] = torch.tensor([bits], dtype=torch.uint16).view(torch.bfloat16)[0].to(dtype)
    (got,) = kernel(op, inputs | {name: dirty}, **attributes)
    rows, want = got.view(-1, got.shape[-1]), clean.view(-1, got.shape[-1])
    assert rows[1].isnan().all()
    assert torch.equal(rows[0], want[0])
    assert torch.equal(rows[2:], want[2:])


MANY_QUERIES = {
    **{"q": random(2, 30, 4, 64), "k": random(2, 30, 2, 64), "v": random(2, 30, 2, 64)},
    **{"cos": random(2, 30, 2), "sin": random(2, 30, 2)},
    **{"k_cache": random(2, 2, 300, 64), "v_cache": random(2, 2, 300, 64)},
    **{"write_index": torch.tensor([200, 0]), "length": torch.tensor([230, 20])},
}
MANY = {
    "RMSNorm": {"x": random(50, 1024), "weight": random(1024)},
    "SiluMul": {"gate": random(70000), "up": random(70000)},
    "ResidualAdd": {"x": random(70000), "update": random(70000)},
    "Linear": {"x": random(40, 130), "weight": random(700, 130), "bias": random(700)},
    "FP8Linear": {"x": random(40, 260), "weight": random(700, 260).to(FP8), "weight_scale": random(700)},
    "MoERouter": {"logits": random(4000, 8), "correction_bias": random(8)},
    "MoEExperts": {
        **{"hidden": random(40, 130), "expert_ids": torch.arange(80, dtype=torch.int32).view(40, 2) % 4},
        **{"expert_weights": random(40, 2), "gate_up": random(4, 140, 130), "down": random(4, 130, 70)},
    },
    "FP8MoEExperts": {
        **{"hidden": random(40, 260), "expert_ids": torch.arange(80, dtype=torch.int32).view(40, 2) % 4},
        **{"expert_weights": random(40, 2), "gate_up": random(4, 140, 260).to(FP8), "gate_up_scale": random(4, 140)},
        **{"down": random(4, 260, 70).to(FP8), "down_scale": random(4, 260)},
    },
    "QkvLinear": {
        **{"x": random(4, 100, 130), "q_weight": random(700, 130), "q_bias": random(700)},
        **{"k_weight": random(60, 130), "k_bias": random(60), "v_weight": random(60, 130), "v_bias": None},
    },
    "MoEBlock": {
        **{"x": random(4, 10, 130), "router_weight": random(4, 130), "correction_bias": random(4)},
        **{"gate_up": random(4, 140, 130), "down": random(4, 130, 70)},
        **{"shared_gate": random(90, 130), "shared_up": random(90, 130), "shared_down": random(130, 90)},
        **{"residual": random(4, 10, 130), "norm_weight": random(130)},
    },
    "CachedAttention": MANY_QUERIES,
    "AttentionBlock": {
        **{**MANY_QUERIES, "o_weight": random(900, 256), "o_bias": random(900)},
        **{"residual": random(2, 30, 900), "norm_weight": random(900)},
    },
    "Logits": {"x": random(3, 1, 130), "weight": random(20000, 130)},
}


@pytest.mark.parametrize("op", MANY)
def test_threads_change_nothing(kernel: RunKernel, op: str) -> None:
    attributes = valid(op)[1]
    want = kernel(op, MANY[op], **attributes)
    for threads in (2, 3):
        for got, one in zip(kernel(op, MANY[op], threads=threads, **attributes), want, strict=True):
            assert torch.equal(got, one)
