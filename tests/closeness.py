"""A comparison of tensors that explains itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor


def expect_close(got: Tensor, want: Tensor, tolerance: float | Tensor, what: str = "result") -> None:
    """Compares element by element in float64; a failure names the worst element."""
    assert got.shape == want.shape, f"{what}: got shape {tuple(got.shape)}, want {tuple(want.shape)}"
    got, want = got.double(), want.double()
    assert got.isfinite().all(), f"{what}: {int((~got.isfinite()).sum())} elements are not finite"
    error, allowed = (got - want).abs(), torch.as_tensor(tolerance, dtype=torch.float64).expand(want.shape)
    excess = error - allowed
    if got.numel() == 0 or excess.max() <= 0:
        return
    where = np.unravel_index(int(excess.argmax()), tuple(want.shape))
    pytest.fail(
        f"{what}: {int((excess > 0).sum())} of {want.numel()} elements are off, worst at {[*map(int, where)]}: "
        f"got {got[where]:.9g}, want {want[where]:.9g}, error {error[where]:.3g}, tolerance {allowed[where]:.3g}"
    )
