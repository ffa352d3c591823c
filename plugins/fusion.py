"""The graph with what always belongs together in one node, for the CPU kernels: threads wait for each other less often.

    Linear -> Reshape, three times, for q, k and v                                     QkvLinear
    CachedAttention -> Reshape -> Linear -> ResidualAdd -> RMSNorm                     AttentionBlock
    Linear -> MoERouter -> MoEExperts, beside Linear, Linear -> SiluMul -> Linear,
        -> ResidualAdd of the two -> ResidualAdd -> RMSNorm                            MoEBlock
    Cast -> Linear -> Squeeze                                                          Logits

A fused op's portable body is the pattern that is looked for, so that the two can not differ. What a body computes only
to reshape is left out, as graphs do that in other ways: a Reshape keeps all elements in order, and the declared shapes
tell the rest.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import onnx

from glm_export.plugins.bodies import fused_functions
from glm_export.plugins.ops import OPS
from glm_export.plugins.schema import COMPUTE, DOMAIN, OpSchema

_LEFT_OUT = ("Identity", "Constant", "Shape", "Unsqueeze", "Concat")
_FLOAT = onnx.TensorProto.FLOAT
_TYPES = {
    "float32": _FLOAT,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float16": onnx.TensorProto.FLOAT16,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "int64": onnx.TensorProto.INT64,
}


def fused(data: bytes, ops: Collection[str]) -> bytes:
    """Returns a serialized model with fused ops for the CPU kernels.

    Args:
        data: model.onnx; its weights stay where they are.
        ops: the names of the ops that have a kernel: nothing else is put in.
    """
    model = onnx.load_from_string(data)
    fuse(model, ops)
    serialized: bytes = model.SerializeToString()
    return serialized


def fuse(model: onnx.ModelProto, ops: Collection[str]) -> None:
    """Puts the fused ops among `ops` into a model, in place; what fits no pattern stays as it is."""
    patterns = [pattern for pattern in _patterns() if pattern.op.name in ops]
    graph = _Graph(model.graph)
    for start in range(len(graph.nodes)):
        for pattern in patterns:
            found = _match(graph, pattern.nodes, _Match(), start)
            node = found and _node(graph, pattern.op, found)
            if found and node:
                graph.replace(found.nodes, node)
                break
    graph.write()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pattern:
    """A fused op and the nodes it stands for, in the names of its body."""

    op: OpSchema
    nodes: tuple[onnx.NodeProto, ...]


@functools.cache
def _patterns() -> tuple[_Pattern, ...]:
    return tuple(_pattern(body) for body in fused_functions())


def _pattern(body: onnx.FunctionProto) -> _Pattern:
    same = {node.output[0]: node.input[0] for node in body.node if node.op_type == "Identity"}
    nodes = [node for node in body.node if node.op_type not in _LEFT_OUT]
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
    return _Pattern(op=OPS[body.name], nodes=tuple(nodes))


@dataclass(frozen=True, slots=True)
class _Match:
    """What a pattern, or its first nodes, have been found to be."""

    nodes: tuple[int, ...] = ()
    values: dict[str, str] = field(default_factory=dict)
    """The body's name of a value -> the graph's; "" for an absent input."""
    attributes: dict[str, onnx.AttributeProto] = field(default_factory=dict)


class _Graph:
    """A graph with who reads what, and what is declared of its values."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.proto = proto
        self.nodes: list[onnx.NodeProto | None] = list(proto.node)
        self.readers: defaultdict[str, list[int]] = defaultdict(list)
        self.writer: dict[str, int] = {}
        for index, node in enumerate(proto.node):
            for name in _reads(node):
                self.readers[name].append(index)
            self.writer |= dict.fromkeys(node.output, index)
        self.outputs = {value.name for value in proto.output}
        self.types: dict[str, int] = {}
        self.shapes: dict[str, tuple[int | str, ...]] = {}
        for value in (*proto.input, *proto.value_info, *proto.output):
            tensor = value.type.tensor_type
            self.types[value.name] = tensor.elem_type
            self.shapes[value.name] = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        self.types |= {tensor.name: tensor.data_type for tensor in proto.initializer}

    def replace(self, indices: Sequence[int], node: onnx.NodeProto) -> None:
        """One node in the place of the first of several; the others are gone."""
        for index in indices:
            self.nodes[index] = None
        self.nodes[indices[0]] = node
        self.writer |= dict.fromkeys(node.output, indices[0])

    def write(self) -> None:
        """Puts the nodes back, without those whose results nobody reads any more, nor what belongs to those."""
        read, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if node is not None and not read.isdisjoint(node.output):
                read.update(_reads(node))
                kept.append(node)
        there = read.union(*(node.output for node in kept))
        constants = [tensor for tensor in self.proto.initializer if tensor.name in read]
        declared = [value for value in self.proto.value_info if value.name in there]
        del self.proto.node[:], self.proto.initializer[:], self.proto.value_info[:]
        self.proto.node.extend(reversed(kept))
        self.proto.initializer.extend(constants)
        self.proto.value_info.extend(declared)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The values a node reads, those that its subgraphs capture included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)


def _match(graph: _Graph, pattern: Sequence[onnx.NodeProto], match: _Match, start: int) -> _Match | None:
    """Finds the rest of a pattern, whose first node is the graph's node `start`; none of the others comes before it."""
    if not pattern:
        return match
    wanted, rest = pattern[0], pattern[1:]
    known = next((match.values[name] for name in wanted.input if name in match.values), None)
    for index in [start] if known is None else graph.readers[known]:
        node = graph.nodes[index]
        if node is None or index < start or index in match.nodes:
            continue
        longer = _add(match, index, wanted, node)
        found = longer and _match(graph, rest, longer, start)
        if found:
            return found
    if wanted.op_type != "Cast":
        return None
    # A float32 value needs no Cast to float32, so that there is none: what it would read and write are one value.
    read, written = wanted.input[0], wanted.output[0]
    same = _Match(match.nodes, match.values | {written: known}, match.attributes) if known else match
    found = _match(graph, rest, same, start)
    value = found.values[written] if found else ""
    if not found or graph.types.get(value) != _FLOAT:
        return None
    return _Match(found.nodes, found.values | {read: value}, found.attributes)


def _add(match: _Match, index: int, wanted: onnx.NodeProto, node: onnx.NodeProto) -> _Match | None:
    """The match with one node more, if that is what is wanted there."""
    if (node.op_type, node.domain) != (wanted.op_type, wanted.domain):
        return None
    read = 1 if wanted.op_type in ("Reshape", "Squeeze") else None
    pairs = [*_pairs(wanted.input[:read], node.input[:read]), *_pairs(wanted.output, node.output)]
    values = dict(match.values)
    for name, value in pairs:
        if value != (values.setdefault(name, value) if name else ""):
            return None
    attributes = dict(match.attributes)
    given = {attribute.name: attribute for attribute in node.attribute}
    for attribute in wanted.attribute:
        found = given.get(attribute.name)
        if found is None:
            return None
        if attribute.ref_attr_name:
            attributes[attribute.ref_attr_name] = found
        elif found != attribute:
            return None
    return _Match((*match.nodes, index), values, attributes)


def _pairs(wanted: Sequence[str], given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values one by one; the shorter one goes on with absent ones."""
    for i in range(max(len(wanted), len(given))):
        yield wanted[i] if i < len(wanted) else "", given[i] if i < len(given) else ""


def _node(graph: _Graph, op: OpSchema, match: _Match) -> onnx.NodeProto | None:
    """The op in the place of a match; None if its inputs do not fit, or if something else reads what is within."""
    nodes = [graph.nodes[index] for index in match.nodes]
    results, within = {match.values[y.name] for y in op.outputs}, set(match.nodes)
    for name in (name for node in nodes if node for name in node.output if name not in results):
        if name in graph.outputs or not within.issuperset(graph.readers[name]):
            return None
    if not _inputs_fit(graph, op, match) or not _ones_fit(graph, op, match):
        return None
    attributes = [match.attributes[a.name] for a in op.attributes if a.name in match.attributes]
    if op.name.endswith("QkvLinear"):
        head_size = _head_size(graph, match)
        if head_size is None:
            return None
        attributes.append(onnx.helper.make_attribute("head_size", head_size))
    module = nodes[0].name.rpartition("/")[0] if nodes[0] else ""
    return onnx.NodeProto(
        domain=DOMAIN,
        op_type=op.name,
        name=f"{module}/{op.name}".removeprefix("/"),
        input=[match.values[x.name] for x in op.inputs],
        output=[match.values[y.name] for y in op.outputs],
        attribute=attributes,
    )


def _inputs_fit(graph: _Graph, op: OpSchema, match: _Match) -> bool:
    """Whether all inputs are there before the first node of the match, in types that the kernels take together."""
    first = match.nodes[0]
    compute = set()
    for x in op.inputs:
        name = match.values[x.name]
        if name == "" and x.optional:
            continue
        kind = graph.types.get(name)
        if kind not in (_TYPES[dtype] for dtype in x.dtypes) or graph.writer.get(name, -1) >= first:
            return False
        if x.dtypes == COMPUTE and not x.name.endswith("_cache"):  # those have a dtype of their own
            compute.add(kind)
    return len(compute) == 1


def _ones_fit(graph: _Graph, op: OpSchema, match: _Match) -> bool:
    """Whether what has a 1 in the shapes of the schema is declared to have it there."""
    for x in (*op.inputs, *op.outputs):
        letters = x.shape.split(",")
        if "1" in letters:
            dims = graph.shapes.get(match.values[x.name], ())
            if [d == 1 for d in dims] != [letter == "1" for letter in letters]:
                return False
    return True


def _head_size(graph: _Graph, match: _Match) -> int | None:
    """The A of x [B,S,D] and q, k, v [B,S,.,A]; None if they are declared to be anything else, or nothing at all."""
    x, *results = (graph.shapes.get(match.values[name], ()) for name in ("x", "q", "k", "v"))
    if len(x) != 3 or not all(x) or any(len(shape) != 4 or shape[:2] != x[:2] for shape in results):
        return None
    sizes = {shape[3] for shape in results}
    size = sizes.pop()
    return size if isinstance(size, int) and size > 0 and not sizes else None
