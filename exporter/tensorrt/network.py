"""A lowered graph and a bundle's weight files -> TensorRT's network, without reading or copying a weight.

The parser is given the address of every weight in a memory map of its file, so the pages are read when the builder
needs them and the graph on disk stays the only description of where they lie.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from glm_export.plugins.external_data import external_tensors
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import BackendError
from glm_export.runtime.tensorrt_library import Library
from glm_export.runtime.weights import Bytes, mapped_weights


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


def _weights(model: onnx.ModelProto, bundle: Bundle) -> Iterator[tuple[str, Bytes]]:
    # Whoever builds an engine has hashed the weights.
    for tensor, data in mapped_weights(external_tensors(model), bundle):
        yield tensor.name, data


def _stand_ins(model: onnx.ModelProto) -> Iterator[tuple[str, Bytes]]:
    """A value for every external tensor, each at its own address.

    Ones for the small float32 tensors, because the parser wants scales to be positive; for all others zeros, in pages
    that nobody writes and that take no memory.
    """
    total = sum(tensor.nbytes for tensor in external_tensors(model))
    pages = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    zeros, end = np.frombuffer(pages, np.uint8), 0
    for tensor in external_tensors(model):
        start, end = end, end + tensor.nbytes
        is_small = tensor.data_type == onnx.TensorProto.FLOAT
        yield tensor.name, np.ones(tensor.nbytes // 4, np.float32).view(np.uint8) if is_small else zeros[start:end]


def _refused(library: Library, parser: Any) -> BackendError:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    reasons = [
        f"node {error.node_name()} ({error.node_operator()}): {error.desc()}" if error.node_name() else error.desc()
        for error in errors[:1]  # those that follow are mostly its consequences
    ]
    reason = " ".join((reasons or library.logger.take_errors() or ["it gave no reason"])[0].split())[:400]
    return BackendError(f"{library.target} {library.version} does not take the graph: {reason}")
