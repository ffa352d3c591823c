"""FP8 E4M3 quantization of rows, the one definition that weights and activations share.

A row is a weight's output channel or a token's activations: scale = amax / 448, value = x / scale rounded to nearest
even, saturated. compressed-tensors calls this strategy "channel" for weights and dynamic "token" for activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes every row of `x`.

    Args:
        x: [..., I], any floating dtype; read as float32.

    Returns:
        values [..., I] float8_e4m3fn, and scales [...] float32, strictly positive (1 where a row is all zero).
    """
    x = x.float()
    scale = x.abs().amax(dim=-1) / E4M3_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    values = (x / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values, scale


def dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    """The float32 numbers [..., I] that `values` [..., I] with row scales [...] stand for."""
    return values.float() * scale[..., None]


def fake_quantize_rows(x: Tensor) -> Tensor:
    """`x` [..., I] rounded to its FP8 rows, as float32."""
    return dequantize_rows(*quantize_rows(x))
