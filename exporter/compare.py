"""How far two sets of logits are apart, in the measures people use, and the judgement against a tolerance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glm_export.runtime.errors import AccuracyError

Floats = npt.NDArray[np.floating[Any]]

OUTLIER_FACTOR = 10
"""A position this many line tolerances off is an outlier: a near-tie in a router fell the other way."""
OUTLIER_SHARE = 0.05
"""Share of positions that may be outliers on top of twice the noise's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Logits `got` against `want`, both [N+1, B, V] float32: after prefill, then after each of N cached steps."""

    title: str
    max_abs: Floats
    """[N+1, B]: largest absolute difference over the vocabulary."""
    relative_l2: Floats
    """[N+1, B]: ||got - want|| / ||want||."""
    cosine: Floats
    """[N+1, B]."""
    kl: Floats
    """[N+1, B]: KL(softmax(want) || softmax(got)), in nats."""
    top1: npt.NDArray[np.bool_]
    """[N+1, B]: the most likely tokens are the same."""
    greedy_tokens: tuple[int, ...]
    """Per row: how many greedy tokens agree before the first that does not, of N+1."""

    @classmethod
    def of(cls, title: str, got: Floats, want: Floats) -> Comparison:
        """Compares; float64 inside.

        Raises:
            AccuracyError: nothing to compare, different shapes, or numbers that are not finite.
        """
        if got.size == 0 or got.shape != want.shape:
            raise AccuracyError(
                f"{title}: logits of shape {list(got.shape)} and {list(want.shape)} leave nothing to compare."
            )
        for name, logits in (("first", got), ("second", want)):
            if not np.isfinite(logits).all():
                step, row = np.argwhere(~np.isfinite(logits).all(axis=-1))[0].tolist()
                raise AccuracyError(f"{title}: logits of the {name} are not finite at step {step}, row {row}.")
        a, b = got.astype(np.float64), want.astype(np.float64)
        norm_a, norm_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
        log_p, log_q = _log_softmax(b), _log_softmax(a)
        top1 = a.argmax(-1) == b.argmax(-1)
        return cls(
            title=title,
            max_abs=np.abs(a - b).max(-1),
            relative_l2=np.linalg.norm(a - b, axis=-1) / np.maximum(norm_b, np.finfo(np.float64).tiny),
            cosine=(a * b).sum(-1) / np.maximum(norm_a * norm_b, np.finfo(np.float64).tiny),
            kl=np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0),
            top1=top1,
            greedy_tokens=tuple(np.logical_and.accumulate(top1, axis=0).sum(0).tolist()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"title": self.title, **self.summary(), "per_step": self.steps()}

    def steps(self) -> list[dict[str, float]]:
        """One entry per step: step 0 is the prefill. Worst over the rows, except for the mean KL and the agreement."""
        return [
            {
                "step": step,
                "max_abs": float(self.max_abs[step].max()),
                "relative_l2": float(self.relative_l2[step].max()),
                "cosine": float(self.cosine[step].min()),
                "kl": float(self.kl[step].mean()),
                "top1_agreement": float(self.top1[step].mean()),
            }
            for step in range(len(self.max_abs))
        ]

    def summary(self) -> dict[str, Any]:
        """The whole comparison in a few numbers."""
        return {
            "positions": int(self.max_abs.size),
            "max_abs": float(self.max_abs.max()),
            "relative_l2_median": float(np.median(self.relative_l2)),
            "relative_l2_max": float(self.relative_l2.max()),
            "cosine_min": float(self.cosine.min()),
            "kl_mean": float(self.kl.mean()),
            "kl_max": float(self.kl.max()),
            "top1_agreement": float(self.top1.mean()),
            "greedy_tokens_agreed": sum(self.greedy_tokens),
            "greedy_tokens": int(self.top1.size),
        }


def table(comparisons: Sequence[Comparison]) -> list[str]:
    """Comparisons for people, a line each under a head."""
    head = ("", "rel. L2 median", "max", "max abs", "cosine min", "KL mean", "top-1", "greedy")
    rows: list[tuple[str, ...]] = [head]
    for comparison in comparisons:
        s = comparison.summary()
        rows.append(
            (
                comparison.title,
                *(f"{s[key]:.2e}" for key in ("relative_l2_median", "relative_l2_max", "max_abs")),
                f"{s['cosine_min']:.6f}",
                f"{s['kl_mean']:.2e}",
                f"{100 * s['top1_agreement']:.1f}%",
                f"{s['greedy_tokens_agreed']}/{s['greedy_tokens']}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """A bound on the relative L2 of logits, and the arithmetic it comes from."""

    bound: float
    reason: str

    def at_least(self, noise: float) -> Tolerance:
        """This bound, or 4 times the noise of the reference itself where that is larger."""
        if 4 * noise <= self.bound:
            return self
        return Tolerance(bound=4 * noise, reason="4 x what another order of summation does to the reference")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether an engine is as close to its reference as rounding allows.

    Judged are the median relative L2 over all positions; the worst row's and the worst step's median, so that neither a
    row nor a step which is wrong throughout can hide; and how many single positions are far off. Medians, because at a
    near-tie in a router the smallest difference sends a token to another expert: the engine is not to blame, and the
    logits differ visibly. (A single row has no median per step: there the outliers decide.)
    """

    median: float
    tolerance: Tolerance
    worst_row: float
    worst_step: float
    line_tolerance: Tolerance
    """For single rows and single steps."""
    outliers: int
    outliers_allowed: int

    @classmethod
    def of(cls, comparison: Comparison, noise: Comparison, *, overall: Tolerance, per_line: Tolerance) -> Verdict:
        """Judges a comparison by two bounds, widened where the reference's own noise is larger."""
        line_tolerance = per_line.at_least(max(_worst_row(noise), _worst_step(noise)))
        limit = OUTLIER_FACTOR * line_tolerance.bound
        noise_outliers = int((noise.relative_l2 > limit).sum())
        return cls(
            median=_median(comparison.relative_l2),
            tolerance=overall.at_least(_median(noise.relative_l2)),
            worst_row=_worst_row(comparison),
            worst_step=_worst_step(comparison),
            line_tolerance=line_tolerance,
            outliers=int((comparison.relative_l2 > limit).sum()),
            outliers_allowed=2 * noise_outliers + int(OUTLIER_SHARE * comparison.relative_l2.size),
        )

    def __bool__(self) -> bool:
        return (
            self.median <= self.tolerance.bound
            and max(self.worst_row, self.worst_step) <= self.line_tolerance.bound
            and self.outliers <= self.outliers_allowed
        )

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return {"passed": bool(self), **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return (
            f"median {self.median:.2e} of {self.tolerance.bound:.2e} allowed ({self.tolerance.reason}), "
            f"worst row's {self.worst_row:.2e} and worst step's {self.worst_step:.2e} of "
            f"{self.line_tolerance.bound:.2e} ({self.line_tolerance.reason}), "
            f"outliers {self.outliers} of {self.outliers_allowed}"
        )


def _median(x: Floats) -> float:
    """The lower median: of an even number, no mean of a good value and an outlier."""
    return float(np.percentile(x, 50, method="lower"))


def _worst_row(comparison: Comparison) -> float:
    return max(_median(row) for row in comparison.relative_l2.T)


def _worst_step(comparison: Comparison) -> float:
    return max(_median(step) for step in comparison.relative_l2) if comparison.relative_l2.shape[1] > 1 else 0.0


def _log_softmax(x: Floats) -> Floats:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
