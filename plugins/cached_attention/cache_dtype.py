"""A graph with KV caches of another dtype: CachedAttention takes any, so only inputs and outputs are to be renamed."""

from __future__ import annotations

from collections.abc import Collection

import onnx

_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float16": onnx.TensorProto.FLOAT16,
}


def with_cache_dtype(data: bytes, caches: Collection[str], dtype: str) -> bytes:
    """The model with its caches in another dtype, serialized.

    Args:
        data: model.onnx; its weights stay where they are, referred to by names relative to its folder.
        caches: names of the graph's cache inputs and outputs.
        dtype: float32, bfloat16 or float16.
    """
    model = onnx.load_from_string(data)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.name in caches:
            value.type.tensor_type.elem_type = _TYPES[dtype]
    serialized: bytes = model.SerializeToString()
    return serialized
