"""model.onnx -> the graph that TensorRT's parser is given: every op in its TensorRT body, or left for a plugin.

    glm::Linear, glm::CachedAttention, ...   inlined TensorRT bodies (plugins/<op>/tensorrt.py)
    glm::MoERouter, glm::MoEExperts, ...     plugin nodes: TensorRT finds their creators by name, namespace and version
    C                                        the capacity: TensorRT's caches have a fixed one; B and S stay free

Bodies are inlined here and not by the parser, so that every layer is called after the node and the op it comes from
(model.layers.0.mlp.gate_proj/FP8Linear/MatMul), and so that a missing plugin is an error and not a silent fallback.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import onnx
from onnx import FunctionProto, NodeProto, TensorProto, helper

from glm_export.plugins.bodies import TENSORRT_DOMAIN, Experts, tensorrt_functions
from glm_export.plugins.schema import DOMAIN, VERSION
from glm_export.runtime.errors import UsageError

Bodies = Mapping[tuple[str, str], FunctionProto]
"""Name and overload -> body."""


def lower(
    model: onnx.ModelProto,
    *,
    compute_dtype: str,
    capacity: int,
    cache_dtype: str = "compute",
    experts: Experts = "plugin",
    decompose_attention: bool = False,
) -> onnx.ModelProto:
    """The graph for TensorRT, with the inputs, outputs and (external) initializers of `model`, which is not changed.

    Args:
        model: a bundle's model.onnx, loaded without external data.
        compute_dtype: float32, bfloat16 or float16: the dtype of activations.
        capacity: C.
        cache_dtype: "compute", or "fp8" for caches of E4M3 (scale 1), whose writer is a plugin.
        experts: what computes router and experts.
        decompose_attention: whether TensorRT may compute attention without a fused kernel (float32; large capacities).

    Raises:
        UsageError: the graph has outputs `attentions`, which TensorRT's attention does not give; or FP8 or float32
            experts are to be computed by TRT_MoE.
    """
    _refuse(model, compute_dtype, experts)
    functions = tensorrt_functions(
        compute_dtype=compute_dtype,
        fp8_cache=cache_dtype == "fp8",
        experts=experts,
        decompose_attention=decompose_attention,
    )
    bodies = {(function.name, function.overload): function for function in functions}
    types = _types(model.graph)

    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    lowered.ClearField("functions")
    lowered.opset_import.append(helper.make_opsetid(TENSORRT_DOMAIN, 1))
    _fix_caches(lowered.graph, capacity, fp8=cache_dtype == "fp8")
    lowered.graph.ClearField("node")
    for node in model.graph.node:
        lowered.graph.node.extend(_expand(node, _overload(node, types), bodies))
    for node in lowered.graph.node:
        if node.domain == DOMAIN:
            node.attribute.append(helper.make_attribute("plugin_namespace", DOMAIN))
            node.attribute.append(helper.make_attribute("plugin_version", str(VERSION)))
    return lowered


def _refuse(model: onnx.ModelProto, compute_dtype: str, experts: Experts) -> None:
    if any(value.name.startswith("attentions.") for value in model.graph.output):
        raise UsageError(
            "This bundle's graph returns attentions, which TensorRT's attention does not compute: build one without "
            "them (hidden_states and router_logits are possible)."
        )
    fp8 = any(node.op_type == "FP8MoEExperts" for node in model.graph.node)
    if experts == "trt_moe" and (fp8 or compute_dtype == "float32"):
        raise UsageError(
            "TRT_MoE computes bf16 and fp16 experts only: leave [engine] experts of this bundle at plugin."
        )


def _fix_caches(graph: onnx.GraphProto, capacity: int, *, fp8: bool) -> None:
    """Gives the caches, before and after, their capacity and dtype."""
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("k_cache", "v_cache")):
            value.type.tensor_type.shape.dim[2].dim_value = capacity
            if fp8:
                value.type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """The dtypes of inputs, initializers and what is known of the values between."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _overload(node: NodeProto, types: Mapping[str, int]) -> str:
    """Which of its op's bodies a node needs."""
    if node.domain != DOMAIN or node.op_type not in ("Linear", "FP8Linear"):
        return ""
    if node.op_type == "Linear" and types[node.input[0]] != types[node.input[1]]:
        assert types[node.input[0]] == TensorProto.FLOAT
        assert not node.input[2]
        return "widened"
    return "bias" if node.input[-1] else ""


def _expand(node: NodeProto, overload: str, bodies: Bodies) -> Iterator[NodeProto]:
    """A node's body with the node's inputs, outputs and attributes in it; the node itself if it has none."""
    body = bodies.get((node.op_type, overload)) if node.domain == DOMAIN else None
    if body is None:
        yield node
        return
    # An absent optional input is called "" in both places.
    names = {
        "": "",
        **dict(zip(body.input, node.input, strict=True)),
        **dict(zip(body.output, node.output, strict=True)),
    }
    attributes = {attribute.name: attribute for attribute in node.attribute}
    used: Counter[str] = Counter()
    for inner in body.node:
        used[inner.op_type] += 1
        count = used[inner.op_type]
        copy = NodeProto(
            op_type=inner.op_type,
            domain=inner.domain,
            name=f"{node.name}/{inner.op_type}" + (f"_{count}" if count > 1 else ""),
            input=[names[name] for name in inner.input],
            output=[names.setdefault(name, f"{node.name}/{name}") for name in inner.output],
        )
        for attribute in inner.attribute:
            added = copy.attribute.add()
            added.CopyFrom(attributes[attribute.ref_attr_name] if attribute.ref_attr_name else attribute)
            added.name = attribute.name
        yield from _expand(copy, "", bodies)
