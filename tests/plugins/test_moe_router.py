from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import cpu_tools
import cuda_tools
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

if TYPE_CHECKING:
    from conftest import Evaluate

MORE_EVALUATORS = cuda_tools.EVALUATORS

U32 = 2.0**-24
SIGMOID = 4 * U32
"""Error of a sigmoid: units in the last place of 1 (ONNX Runtime's is a rational function)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: int = 1
    routed_scaling_factor: float = 1.0


def brute_force(logits: Tensor, bias: Tensor, a: Attributes) -> tuple[list[dict[int, float]], list[float]]:
    """Each token's id -> weight, best first, and by how much the closest decision was made. Loops, float64."""
    tokens, margins = [], []
    for row in logits.double().numpy():
        score = 1 / (1 + np.exp(-row))
        choice = score + bias.double().numpy()
        size = len(row) // a.n_group
        members = [range(g * size, (g + 1) * size) for g in range(a.n_group)]
        group_score = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in members]
        groups = sorted(range(a.n_group), key=lambda g: (-group_score[g], g))
        allowed = [e for g in groups[: a.topk_group] for e in members[g]]
        ranked = sorted(allowed, key=lambda e: (-choice[e], e))
        chosen = ranked[: a.top_k]
        total = sum(score[e] for e in chosen) + 1e-20 if a.norm_topk_prob else 1.0
        tokens.append({e: score[e] / total * a.routed_scaling_factor for e in chosen})
        margin = [float("inf")]
        if a.topk_group < a.n_group:
            margin.append(group_score[groups[a.topk_group - 1]] - group_score[groups[a.topk_group]])
        margin += [choice[e] - choice[f] for e, f in itertools.pairwise(ranked[: a.top_k + 1])]
        margins.append(min(margin))
    return tokens, margins


def check(got: list[Tensor], logits: Tensor, bias: Tensor, a: Attributes, *, exact_ties: bool = False) -> None:
    ids, weights = got
    assert ids.shape == weights.shape == (len(logits), a.top_k)
    want, margins = brute_force(logits, bias, a)
    # Sums of two scores and two biases: what is closer than this, float32 may decide either way.
    undecided = 4 * (SIGMOID + U32 * (1 + float(bias.abs().max())))
    compared = 0
    for t, (token, margin) in enumerate(zip(want, margins, strict=True)):
        if margin <= undecided and not exact_ties:
            continue
        compared += 1
        found = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
        assert list(found) == list(token), f"token {t}: chose {list(found)}, want {list(token)}, margin {margin:.3g}"
        factor = a.routed_scaling_factor
        for e, weight in token.items():
            # A score's own error and that of the sum of K (norm on), K sums, quotient, product.
            score = torch.sigmoid(logits[t, e].double()).item()
            total = score / (weight / factor) if a.norm_topk_prob else 1.0
            tolerance = weight * (SIGMOID / score + a.top_k * SIGMOID / total + (a.top_k + 3) * U32)
            assert abs(found[e] - weight) <= tolerance, (
                f"token {t}, expert {e}: got {found[e]:.9g}, want {weight:.9g}, tolerance {tolerance:.3g}"
            )
    assert compared >= 0.9 * len(want), f"only {compared} of {len(want)} tokens have a clear choice"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BIASES = {"zero": (0.0, 0.0), "mixed": (0.1, 0.0), "negative": (0.1, -2.0), "large": (5.0, 0.0)}  # deviation, mean


def biased(E: int, bias: str) -> Tensor:
    deviation, mean = BIASES[bias]
    return random(E, seed=8) * deviation + mean


GRID = [
    (E, Attributes(top_k=K, n_group=G, topk_group=kept, norm_topk_prob=norm, routed_scaling_factor=scaling))
    for E, K, (G, kept), (norm, scaling) in itertools.product(
        (8, 128, 160), (2, 8), ((1, 1), (4, 1), (4, 2), (4, 3)), ((1, 1.0), (1, 2.5), (0, 1.0), (0, 2.5))
    )
    if E // G * kept >= K
]


def case_name(value: object) -> str:
    return "-".join(str(v) for v in asdict(value).values()) if isinstance(value, Attributes) else str(value)


@pytest.mark.parametrize(("E", "a"), GRID, ids=case_name)
@pytest.mark.parametrize("bias", BIASES)
def test_transformers(E: int, a: Attributes, bias: str) -> None:
    logits, correction = random(64, E, seed=E) * 2, biased(E, bias)
    ids, weights = torch.ops.glm.moe_router(logits, correction, *asdict(a).values())
    check([ids, weights], logits, correction, a)

    # With the identity as router weight, hidden states are logits: the sums have one term.
    table = asdict(a) | {"norm_topk_prob": bool(a.norm_topk_prob), "num_experts_per_tok": a.top_k}
    del table["top_k"]
    router = Glm4MoeTopkRouter(transformers.Glm4MoeConfig(hidden_size=E, n_routed_experts=E, **table))
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
        router.e_score_correction_bias.copy_(correction)
        their_logits, their_weights, their_ids = router(logits)
    assert torch.equal(their_logits, logits)
    # The same float32 operations on the same numbers; only the order of the sum of K differs.
    order, their_order = ids.long().argsort(dim=-1), their_ids.argsort(dim=-1)
    assert torch.equal(ids.long().gather(1, order), their_ids.gather(1, their_order))
    torch.testing.assert_close(
        weights.gather(1, order), their_weights.gather(1, their_order), rtol=2 * a.top_k * U32, atol=0.0
    )


# The ONNX reference evaluator's GatherElements takes at most 63 experts.
many_experts = pytest.mark.parametrize(
    "evaluate", ["reference", "onnxruntime", *cpu_tools.EVALUATORS, *MORE_EVALUATORS], indirect=True
)
biases = pytest.mark.parametrize("bias", BIASES)
one_or_more = pytest.mark.parametrize("tokens", [1, 50], ids=["one_token", "tokens"])


@pytest.mark.parametrize(
    "a",
    [
        Attributes(top_k=2),
        Attributes(top_k=8, norm_topk_prob=0),
        Attributes(top_k=2, n_group=4, topk_group=1, routed_scaling_factor=2.5),
        Attributes(top_k=3, n_group=2, topk_group=1),
    ],
    ids=case_name,
)
@biases
@one_or_more
def test_brute_force(evaluate: Evaluate, a: Attributes, bias: str, tokens: int) -> None:
    logits, correction = random(tokens, 8, seed=7) * 2, biased(8, bias)
    check(evaluate("MoERouter", logits, correction, **asdict(a)), logits, correction, a)


@many_experts
@pytest.mark.parametrize(
    ("E", "a"),
    [
        (128, Attributes(top_k=8, n_group=4, topk_group=3, norm_topk_prob=0, routed_scaling_factor=2.5)),
        (160, Attributes(top_k=8, routed_scaling_factor=2.5)),
    ],
    ids=case_name,
)
@biases
@one_or_more
def test_brute_force_many_experts(evaluate: Evaluate, E: int, a: Attributes, bias: str, tokens: int) -> None:
    logits, correction = random(tokens, E, seed=7) * 2, biased(E, bias)
    check(evaluate("MoERouter", logits, correction, **asdict(a)), logits, correction, a)


@pytest.mark.parametrize("evaluate", ["reference", "kernel_scalar", *MORE_EVALUATORS], indirect=True)
@pytest.mark.parametrize(
    ("E", "a"),
    [
        (1, Attributes(top_k=1)),
        (7, Attributes(top_k=7, n_group=7, topk_group=7)),
        (64, Attributes(top_k=32)),
        (100, Attributes(top_k=7, n_group=25, topk_group=5)),
        (256, Attributes(top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5)),
        (416, Attributes(top_k=10, n_group=32, topk_group=31)),
        (512, Attributes(top_k=10, norm_topk_prob=0)),
    ],
    ids=case_name,
)
def test_other_models(evaluate: Evaluate, E: int, a: Attributes) -> None:
    logits, correction = random(20, E, seed=7) * 2, biased(E, "mixed")
    check(evaluate("MoERouter", logits, correction, **asdict(a)), logits, correction, a)


@pytest.mark.parametrize("evaluate", ["reference", *cpu_tools.EVALUATORS, *MORE_EVALUATORS], indirect=True)
def test_fewer_experts_than_wanted_in_the_groups(evaluate: Evaluate) -> None:
    # Masked experts are all the same, so the lowest ids come next.
    a = Attributes(top_k=4, n_group=4, topk_group=1, norm_topk_prob=0)
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5, 3.0, 2.0, 0.0, 0.0]])
    ids, _ = evaluate("MoERouter", logits, torch.zeros(8), **asdict(a))
    assert ids.tolist() == [[4, 5, 0, 1]]


@pytest.mark.parametrize("evaluate", ["kernel_scalar", *MORE_EVALUATORS], indirect=True)
def test_nan_stays_within_the_experts(evaluate: Evaluate) -> None:
    a = Attributes(top_k=8, n_group=4, topk_group=4)
    logits = torch.full((3, 40), float("nan"))
    logits[1, ::2] = 1
    logits[2] = -logits[2]
    ids, _ = evaluate("MoERouter", logits, torch.zeros(40), **asdict(a))
    assert all(len({*token} & {*range(40)}) == a.top_k for token in ids.tolist())


@many_experts
def test_many_tokens(evaluate: Evaluate) -> None:
    a = Attributes(top_k=8, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    logits, bias = random(1501, 160, seed=1) * 2, random(160, seed=2) * 0.1
    check(evaluate("MoERouter", logits, bias, **asdict(a)), logits, bias, a)


@pytest.mark.parametrize(
    "a",
    [Attributes(top_k=2), Attributes(top_k=3, n_group=2), Attributes(top_k=4, n_group=4, topk_group=2)],
    ids=case_name,
)
def test_ties_go_to_the_lowest_id(evaluate: Evaluate, a: Attributes) -> None:
    # Three levels whose sums of two are all different: experts and groups tie exactly, or are far apart.
    levels = torch.tensor([0.0, 1.0, 2.0])
    logits = levels[torch.randint(3, (200, 8), generator=torch.Generator().manual_seed(3))]
    check(evaluate("MoERouter", logits, torch.zeros(8), **asdict(a)), logits, torch.zeros(8), a, exact_ties=True)


@pytest.mark.parametrize("E", [8, 60])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2)])
def test_all_equal(evaluate: Evaluate, E: int, n_group: int, topk_group: int) -> None:
    a = Attributes(top_k=4, n_group=n_group, topk_group=topk_group)
    ids, weights = evaluate("MoERouter", torch.full((5, E), 0.5), torch.full((E,), -0.25), **asdict(a))
    assert ids.tolist() == [[0, 1, 2, 3]] * 5
    # Four equal weights that were divided by their sum.
    torch.testing.assert_close(weights, torch.full((5, 4), 0.25), rtol=(a.top_k + 3) * U32, atol=0.0)


def test_masked_groups_stay_out(evaluate: Evaluate) -> None:
    # Every selection score is negative, so a mask of 0 instead of minus infinity would let the lost group win.
    a = Attributes(top_k=2, n_group=2, topk_group=1, norm_topk_prob=0)
    logits = torch.tensor(
        [[3.0, -4.0, -4.0, -4.0, 1.0, 1.5, -4.0, -4.0], [2.0, 2.5, -4.0, -4.0, 3.0, -4.0, -4.0, -4.0]]
    )
    bias = torch.full((8,), -3.0)
    ids, _ = found = evaluate("MoERouter", logits, bias, **asdict(a))
    assert ids.tolist() == [[5, 4], [1, 0]]  # the best single expert is in the group whose best two lose
    check(found, logits, bias, a)


def test_bias_chooses_but_does_not_weigh(evaluate: Evaluate) -> None:
    a = Attributes(top_k=1, norm_topk_prob=0)
    bias = torch.zeros(8)
    bias[6] = 10
    ids, weights = evaluate("MoERouter", torch.zeros(2, 8), bias, **asdict(a))
    assert ids.tolist() == [[6], [6]]
    assert (weights - 0.5).abs().max() <= SIGMOID


def test_saturated_scores_stay_finite(evaluate: Evaluate) -> None:
    a = Attributes(top_k=2, routed_scaling_factor=2.5)
    logits = torch.full((2, 8), -200.0)  # a sigmoid of zero: the sum is only the 1e-20
    logits[1] = 200.0
    _, weights = evaluate("MoERouter", logits, torch.zeros(8), **asdict(a))
    assert weights.isfinite().all()
    assert weights.ge(0).all()
    torch.testing.assert_close(weights[1], torch.full((2,), 1.25), rtol=2 * SIGMOID, atol=0.0)


def test_brute_force_knows_the_rule() -> None:
    # The oracle itself, on an example worked by hand.
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    found: list[dict[int, Any]] = brute_force(logits, torch.tensor([0.0, 0.1, 0.3, -1.0]), Attributes(top_k=2))[0]
    assert found == [{2: 0.5, 1: 0.5}]
    a = Attributes(top_k=2, n_group=2, norm_topk_prob=0, routed_scaling_factor=2.0)
    assert brute_force(logits, torch.tensor([0.0, 0.1, 0.3, -1.0]), a)[0] == [{1: 1.0, 0: 1.0}]
