"""The routed experts in float64, with a bound on what float32 sums in any order may differ by."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

U32 = 2.0**-24


@dataclass(frozen=True, slots=True)
class Bounded:
    """Numbers in float64 and how far a float32 computation of them may be off."""

    value: Tensor
    error: Tensor

    def product(self, weight: Tensor, extra: int = 0, *, short_sums: bool = False) -> Bounded:
        """self [1, I] @ weight^T [I, O], summed in any order; `extra` roundings of the factors."""
        roundings = (self.value.shape[-1] + extra) * U32
        size = weight.abs().T
        error = self.error @ size + roundings * (self.value.abs() @ size)
        return Bounded(self.value @ weight.T, error + (_loss(self.value * weight) if short_sums else 0))

    def silu_times(self, up: Bounded) -> Bounded:
        silu = self.value * self.value.sigmoid()
        # The slope of SiLU is below 1.1; a sigmoid is good to 4 units in the last place of 1.
        error = 1.1 * self.error + 4 * U32 * self.value.abs()
        value = silu * up.value
        return Bounded(value, error * up.value.abs() + silu.abs() * up.error + error * up.error + 2 * U32 * value.abs())

    def rounded(self, dtype: torch.dtype) -> Bounded:
        """Rounding is monotone: where the interval holds no tie, nothing is off after it."""
        low, middle, high = (
            x.to(dtype).double() for x in (self.value - self.error, self.value, self.value + self.error)
        )
        return Bounded(middle, torch.maximum(high - middle, middle - low))

    def e4m3_rows(self) -> Bounded:
        amax, amax_error = self.value.abs().amax(-1, keepdim=True), self.error.amax(-1, keepdim=True)
        scale = amax.float() / 448
        scale = torch.where(scale > 0, scale, 1.0).double()
        relative = amax_error / amax.clamp(min=1e-30) + (2 * U32 if amax_error.any() else 0)
        scaled = self.value / scale
        error = self.error / scale + scaled.abs() * relative
        low, middle, high = (e4m3(x) for x in (scaled - error, scaled, scaled + error))
        error = torch.maximum(high - middle, middle - low) + middle.abs() * (relative + U32)
        return Bounded(middle * scale, error * scale)


def _loss(terms: Tensor) -> Tensor:
    """What tensor cores lose of sums over terms [O, I] when they multiply E4M3.

    They add 32 terms and the sum so far at once, of each no more than 13 bits below the exponent of the largest one;
    after 128 terms a kernel starts a new sum.
    """
    parts = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % 128)).reshape(len(terms), -1, 4, 32)
    so_far = parts.sum(-1).cumsum(-1).roll(1, -1)
    so_far[..., 0] = 0
    largest = torch.maximum(parts.abs().amax(-1), so_far.abs())
    return 33 * 2.0**-13 * largest.sum((-1, -2))


def e4m3(x: Tensor) -> Tensor:
    values = np.clip(x.numpy().astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(values.astype(np.float64))


def exact(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    fp8: bool,
    short_sums: bool = False,
) -> Bounded:
    """A loop over tokens and choices. gate_up and down in float64, dequantized when FP8."""
    x = Bounded(hidden.double(), torch.zeros(hidden.shape, dtype=torch.float64))
    if fp8:
        x = x.e4m3_rows()
    want, error = torch.zeros_like(x.value), torch.zeros_like(x.value)
    for t in range(len(hidden)):
        token = Bounded(x.value[t : t + 1], x.error[t : t + 1])
        for e, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            both = token.product(gate_up[e], extra=fp8, short_sums=short_sums)
            half = both.value.shape[-1] // 2
            gate, up = (Bounded(both.value[:, s], both.error[:, s]) for s in (slice(half), slice(half, None)))
            h = gate.silu_times(up).rounded(hidden.dtype)
            y = (h.e4m3_rows() if fp8 else h).product(down[e], extra=fp8, short_sums=short_sums)
            want[t] += weight * y.value[0]
            error[t] += weight.abs() * (y.error[0] + (ids.shape[1] + 1) * U32 * y.value[0].abs())
    info = torch.finfo(hidden.dtype)
    return Bounded(want, error + torch.maximum(want.abs() + error, torch.tensor(info.smallest_normal)) * info.eps / 2)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def choose(tokens: int, experts: int, k: int, *, among: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + experts)
    pool = torch.tensor(among or range(experts))
    ids = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:k]] for _ in range(tokens)])
    return ids.int(), torch.rand(tokens, k, generator=generator) * 2.5
