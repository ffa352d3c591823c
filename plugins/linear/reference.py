from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glm_export.plugins.fp8 import dequantize_rows, fake_quantize_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns y [..., O] in the dtype of x [..., I]; weight [O, I] of any floating dtype, bias [O] float32."""
    return F.linear(x.float(), weight.float(), bias).to(x.dtype)


def fp8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """W8A8: x [..., I] is rounded to FP8 per row; weight [O, I] E4M3, weight_scale [O] float32, bias [O] float32."""
    return F.linear(fake_quantize_rows(x), dequantize_rows(weight, weight_scale), bias).to(x.dtype)
