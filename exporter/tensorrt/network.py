"""A lowered graph and a bundle's weight files -> TensorRT's network, without reading or copying a weight.

The parser is given the address of every weight in a memory map of its file, so the pages are read when the builder
needs them and the graph on disk stays the only description of where they lie.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import ExternalDataInfo

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import BackendError, IntegrityError
from glm_export.runtime.tensorrt_library import Library

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A parsed network."""

    library: Library
    builder: Any
    """The IBuilder it belongs to."""
    definition: Any
    """The INetworkDefinition, strongly typed."""
    weight_bytes: int
    """What the graph refers to in weight files."""
    keep: tuple[object, ...]
    """Parser and memory maps, which the definition points into."""


def parse_network(library: Library, model: onnx.ModelProto, bundle: Bundle) -> Network:
    """Gives a lowered graph to TensorRT's parser.

    Args:
        library: what parses it.
        model: as `lower` returns it, with the bundle's weights as external data.
        bundle: where they lie. One that was built without weights gets stand-ins: its network can be looked at.

    Raises:
        BackendError: the library does not take the graph; the sentence has the node and its reason.
        IntegrityError: a weight does not lie where the graph says.
    """
    library.logger.take_errors()  # of someone else
    try:
        builder = library.module.Builder(library.logger)
    except TypeError:  # what a null pointer becomes in Python
        reason = "; ".join(library.logger.take_errors()[:1]) or "it gave no reason"
        raise BackendError(f"{library.target} {library.version} can not build engines here: {reason}") from None
    definition = builder.create_network(0)  # every network is strongly typed since TensorRT 11
    parser = library.module.OnnxParser(definition, library.logger)
    if not parser.load_model_proto(model.SerializeToString()):
        raise _refused(library, parser)
    weights = dict(_stand_ins(model) if not bundle.manifest.weights else _weights(model, bundle))
    for name, data in weights.items():
        if not parser.load_initializer(name, data.ctypes.data, data.nbytes):
            raise _refused(library, parser)
    if not parser.parse_model_proto():
        raise _refused(library, parser)
    return Network(
        library=library,
        builder=builder,
        definition=definition,
        weight_bytes=sum(data.nbytes for data in weights.values()),
        keep=(parser, tuple(weights.values())),
    )


def external_data(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, ExternalDataInfo]]:
    """The weights of a graph and where they lie."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor, ExternalDataInfo(tensor)


def _weights(model: onnx.ModelProto, bundle: Bundle) -> Iterator[tuple[str, Bytes]]:
    """The bytes of every external tensor; each file is mapped once."""
    files: dict[str, Bytes] = {}
    for tensor, place in external_data(model):
        if place.location not in files:
            # Whoever builds an engine has hashed the weights; a map follows the sizes that were checked.
            path = bundle.file(place.location, hashed=False)
            files[place.location] = np.memmap(path, dtype=np.uint8, mode="r")
        file, start, length = files[place.location], place.offset or 0, place.length or 0
        if length != _size(tensor) or start + length > len(file):
            raise IntegrityError(
                f"{tensor.name} should be {_size(tensor)} bytes at {start} of {place.location}, which has {len(file)}: "
                "build the bundle again."
            )
        yield tensor.name, file[start : start + length]


def _stand_ins(model: onnx.ModelProto) -> Iterator[tuple[str, Bytes]]:
    """A value for every external tensor, each at its own address.

    Ones for the small float32 tensors, because the parser wants scales to be positive; for all others zeros, in pages
    that nobody writes and that take no memory.
    """
    total = sum(_size(tensor) for tensor, _ in external_data(model))
    pages = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    zeros, end = np.frombuffer(pages, np.uint8), 0
    for tensor, _ in external_data(model):
        start, end = end, end + _size(tensor)
        is_small = tensor.data_type == onnx.TensorProto.FLOAT
        yield tensor.name, np.ones(_size(tensor) // 4, np.float32).view(np.uint8) if is_small else zeros[start:end]


def _size(tensor: onnx.TensorProto) -> int:
    """Of a tensor without its data, in bytes."""
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return itemsize * math.prod(map(int, tensor.dims))


def _refused(library: Library, parser: Any) -> BackendError:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    reasons = [
        f"node {error.node_name()} ({error.node_operator()}): {error.desc()}" if error.node_name() else error.desc()
        for error in errors[:1]  # those that follow are mostly its consequences
    ]
    reason = " ".join((reasons or library.logger.take_errors() or ["it gave no reason"])[0].split())[:400]
    return BackendError(f"{library.target} {library.version} does not take the graph: {reason}")
