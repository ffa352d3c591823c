from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from glm_export.exporter.compare import Comparison, Tolerance, Verdict
from glm_export.runtime.errors import AccuracyError


def logits(seed: int = 0, shape: tuple[int, ...] = (5, 3, 20)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_measures_against_torch():
    a, b = logits(0), logits(0) + 0.1 * logits(1)
    got = Comparison.of("t", b, a)
    ta, tb = torch.tensor(a).double(), torch.tensor(b).double()
    np.testing.assert_allclose(got.max_abs, (ta - tb).abs().amax(-1), rtol=1e-12)
    np.testing.assert_allclose(got.relative_l2, (ta - tb).norm(dim=-1) / ta.norm(dim=-1), rtol=1e-12)
    np.testing.assert_allclose(got.cosine, torch.cosine_similarity(ta, tb, dim=-1), rtol=1e-12)
    kl = torch.nn.functional.kl_div(tb.log_softmax(-1), ta.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(got.kl, kl, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(got.top1, ta.argmax(-1) == tb.argmax(-1))


def test_greedy_agreement_ends_at_the_first_other_token():
    want = np.zeros((4, 2, 3), np.float32)
    want[..., 1] = 1
    got = want.copy()
    got[2, 0] = [5, 0, 0]  # row 0 leaves after two tokens and comes back, row 1 never leaves
    assert Comparison.of("t", got, want).greedy_tokens == (2, 4)
    assert Comparison.of("t", got, want).summary()["greedy_tokens_agreed"] == 6


@pytest.mark.parametrize("shape", [(0, 3, 20), (5, 0, 20), (5, 3, 0)])
def test_comparing_nothing_fails(shape):
    empty = np.zeros(shape, np.float32)
    with pytest.raises(AccuracyError, match="nothing to compare"):
        Comparison.of("t", empty, empty)


def test_different_shapes_fail():
    with pytest.raises(AccuracyError, match="nothing to compare"):
        Comparison.of("t", logits(), logits()[:4])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_fails_and_is_located(bad, side):
    pair = [logits(), logits()]
    pair[side][3, 1, 7] = bad
    with pytest.raises(AccuracyError, match="not finite at step 3, row 1"):
        Comparison.of("t", *pair)


BOUND = Tolerance(bound=1e-3, reason="test")


def judged(got: np.ndarray, noise: float = 0.0) -> Verdict:
    want = logits()
    twin = Comparison.of("noise", want * (1 + noise), want)
    return Verdict.of(Comparison.of("t", got, want), twin, overall=BOUND, per_line=BOUND)


def test_an_equal_engine_passes():
    assert judged(logits())


def test_an_engine_off_everywhere_fails_and_passes_when_the_reference_is_as_noisy():
    assert not judged(logits() * 1.01)
    assert judged(logits() * 1.01, noise=0.005)
    assert "another order of summation" in judged(logits() * 1.01, noise=0.005).tolerance.reason


def test_a_row_that_is_wrong_throughout_can_not_hide():
    got = logits()
    got[:, 2] *= 1.005
    verdict = judged(got)
    assert verdict.median == 0
    assert verdict.worst_row > verdict.line_tolerance.bound
    assert not verdict


def test_a_step_that_is_wrong_throughout_can_not_hide():
    got = logits()
    got[0] *= 1.005
    verdict = judged(got)
    assert verdict.median == 0
    assert verdict.worst_step > verdict.line_tolerance.bound
    assert not verdict


def test_single_positions_far_off_are_counted():
    got = logits()
    got[1, 0] = -got[1, 0]
    assert judged(got).outliers == 1
    assert not judged(got), "one of fifteen positions is more than the allowed share"


def test_a_verdict_explains_itself():
    text = str(judged(logits() * 1.01))
    assert "1.00e-02 of 1.00e-03 allowed (test)" in text
    assert "outliers" in text
