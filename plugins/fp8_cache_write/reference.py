from __future__ import annotations

import torch
from torch import Tensor

from glm_export.plugins.fp8 import E4M3_MAX


def fp8_cache_write(cache: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    """Returns cache_out [B, J, C, A]: the cache with the new tokens' rows in E4M3.

    The scale is 1, as serving engines have it where there is no calibration: keys and values are of the order of 1.

    Args:
        cache: [B, J, C, A] float8_e4m3fn.
        update: [B, J, S, A]; saturated at +-448, rounded to nearest even.
        write_index: [B] int32: token s of row b goes to position write_index[b] + s, or nowhere if that is not in
            0 .. C - 1.
    """
    C = cache.shape[2]
    rows_BJSA = update.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    cache_out = cache.clone()
    for b, start in enumerate(write_index.tolist()):
        for s in range(update.shape[2]):
            if 0 <= start + s < C:
                cache_out[b, :, start + s] = rows_BJSA[b, :, s]
    return cache_out
