"""The ONNX reference evaluator with what it lacks: TensorRT ops by their documentation, plugins by their reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from glm_export.plugins.bodies import TENSORRT_DOMAIN
from glm_export.plugins.fp8_cache_write.reference import fp8_cache_write
from glm_export.plugins.moe_experts.reference import fp8_moe_experts, moe_experts
from glm_export.plugins.moe_router.reference import moe_router
from glm_export.plugins.ops import OPS, TENSORRT_PLUGINS
from glm_export.plugins.schema import DOMAIN, VERSION
from glm_export.runtime.contract import Contract

Array = np.ndarray[Any, Any]

NUMPY_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}
_TORCH_DTYPES = {numpy: dtype for dtype, numpy in NUMPY_DTYPES.items()}


def to_numpy(x: Tensor) -> Array:
    """The same bytes as an array; numpy has no bfloat16 nor FP8 of its own."""
    flat: Array = x.contiguous().flatten().view(torch.uint8).numpy()
    return flat.view(NUMPY_DTYPES[x.dtype]).reshape(tuple(x.shape))


def to_torch(x: Array) -> Tensor:
    """The same bytes as a tensor."""
    data = torch.from_numpy(np.array(x, order="C").reshape(-1).view(np.uint8))
    return data.view(_TORCH_DTYPES[x.dtype]).reshape(x.shape)


class TRT_Attention(OpRun):  # noqa: N801 (the evaluator finds an op by the name of its class)
    """softmax(q k^T) v over [B, heads, tokens, A], without a scale, as far as each row's kv length; float32 inside.

    Lower right: the last query sees the last key within the length; upper left: the first query sees the first key.
    """

    op_domain = TENSORRT_DOMAIN

    def _run(  # type: ignore[override]
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | None,
        query_lengths: Array | None,
        kv_lengths: Array,
        causal_kind: str | None = None,
        TRT_decomposable: int | None = None,
    ) -> tuple[Array]:
        assert mask is None
        assert query_lengths is None
        assert kv_lengths.dtype == np.int32
        assert q.dtype == k.dtype == v.dtype
        H, S = q.shape[1:3]
        J, C = k.shape[1:3]
        keys, values = (np.repeat(x.astype(np.float32), H // J, axis=1) for x in (k, v))
        query_S1, key_C = np.arange(S)[:, None], np.arange(C)
        length_B11 = kv_lengths[:, None, None]
        offset = {"lower_right": length_B11 - S, "upper_left": 0, "none": C}[str(causal_kind)]
        visible_BSC = (key_C <= query_S1 + offset) & (key_C < length_B11)
        scores = np.where(visible_BSC[:, None], q.astype(np.float32) @ keys.swapaxes(-1, -2), np.float32(-np.inf))
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        return ((probs @ values).astype(q.dtype),)


def _plugin(name: str) -> type[OpRun]:
    references = {
        "MoERouter": moe_router,
        "MoEExperts": moe_experts,
        "FP8MoEExperts": fp8_moe_experts,
        "FP8CacheWrite": fp8_cache_write,
    }
    reference: Any = references[name]

    def run(self: Any, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        assert (self.plugin_namespace, self.plugin_version) == (DOMAIN, str(VERSION))
        found = reference(*map(to_torch, inputs), *(getattr(self, a.name) for a in OPS[name].attributes))
        return tuple(map(to_numpy, (found,) if isinstance(found, Tensor) else found))

    return type(name, (OpRun,), {"op_domain": DOMAIN, "_run": run})


TENSORRT_OPS = [TRT_Attention, *map(_plugin, TENSORRT_PLUGINS)]
"""For ReferenceEvaluator(new_ops=...): what a lowered graph has beyond standard ONNX."""


class OnnxEvaluator:
    """Steps a bundle's graph, portable or lowered, in the ONNX reference evaluator, keeping the caches.

    Args:
        model: with its weights.
        contract: what it was exported for.
        batch: rows.
        capacity: C.
        fp8_cache: whether the graph was lowered for E4M3 caches.
    """

    def __init__(
        self, model: onnx.ModelProto, contract: Contract, *, batch: int, capacity: int, fp8_cache: bool = False
    ) -> None:
        # Function bodies of the ops come before new_ops: only a lowered graph has none.
        lowered = not model.functions
        self._evaluator = ReferenceEvaluator(model, new_ops=TENSORRT_OPS if lowered else None)
        dims: dict[int | str, int] = {"B": batch, "C": capacity}
        dtype = np.dtype(
            getattr(ml_dtypes, "float8_e4m3fn" if fp8_cache else contract.compute_dtype, None) or contract.compute_dtype
        )
        self.caches = {c.name: np.zeros([dims.get(d, d) for d in c.shape], dtype) for c in contract.caches()}
        self.length = np.zeros(batch, np.int64)

    def step(self, tokens: Array, counts: Array) -> Array:
        """The logits of new tokens [B, S], of which counts [B] are valid."""
        inputs = {"input_ids": np.array(tokens), "write_index": self.length, "length": self.length + counts}
        with np.errstate(all="ignore"):  # sigmoid of a large number overflows on its way to 0
            logits, *caches = self._evaluator.run(None, inputs | self.caches)
        self.length = self.length + counts
        self.caches = dict(zip(self.caches, caches, strict=False))
        return logits
