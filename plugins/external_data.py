"""Where a graph's weights lie: the tensors of model.onnx that are kept in other files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx.external_data_helper import ExternalDataInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalTensor:
    """A weight by its name, and where the graph says its bytes are."""

    name: str
    data_type: int
    """A value of onnx.TensorProto.DataType."""
    itemsize: int
    """Of an element, in bytes."""
    shape: tuple[int, ...]
    location: str
    """The file, relative to the graph's folder."""
    offset: int
    """In bytes, from the start of the file."""
    length: int
    """In bytes, as the graph says it."""
    looked_up: bool
    """Whether nodes only pick rows of it, as of the embedding."""

    @property
    def nbytes(self) -> int:
        """The bytes that type and shape ask for."""
        return self.itemsize * math.prod(self.shape)


def external_tensors(model: onnx.ModelProto | bytes) -> Iterator[ExternalTensor]:
    """The weights of a graph, or of a serialized one, that lie in files, in the graph's order."""
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else model
    read_whole = {name for node in proto.graph.node if node.op_type != "Gather" for name in node.input}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = ExternalDataInfo(tensor)
            yield ExternalTensor(
                name=tensor.name,
                data_type=tensor.data_type,
                itemsize=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize,
                shape=tuple(map(int, tensor.dims)),
                location=place.location,
                offset=place.offset or 0,
                length=place.length or 0,
                looked_up=tensor.name not in read_whole,
            )
