"""Readable names in the graph: every node and value is called after the module it comes from.

    linear_3, val_24, getitem_8  ->  model.layers.0.self_attn.o_proj/Linear, .../Concat, .../MoERouter/expert_ids

The module path and the op it came from also stay in metadata_props (`source_module`, `source_op`), where Netron shows
them; what torch put there besides (stack traces, file paths) goes.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

from glm_export.plugins.ops import OPS
from glm_export.plugins.schema import DOMAIN

_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch's name for shapes of the inputs
_CLASSES = "pkg.torch.onnx.class_hierarchy"


def name_after_modules(model: ir.Model) -> None:
    """Renames nodes, their outputs and constants in place. Graph inputs and outputs and parameters keep their names."""
    fixed = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    used: Counter[str] = Counter()
    for node in model.graph:
        module, source_op = _source(node)
        node.name = _unique(f"{module}/{node.op_type}" if module else node.op_type, used)
        node.metadata_props.clear()
        node.metadata_props["source_module"] = module
        if source_op:
            node.metadata_props["source_op"] = source_op
        for index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if id(value) not in fixed:
                value.name = _value_name(node, index)
    _name_constants(model)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _source(node: ir.Node) -> tuple[str, str]:
    """Module path and torch op of a node; passes that insert nodes leave none."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
    classes = ast.literal_eval(node.metadata_props.get(_CLASSES, "['']"))
    module = scopes[-2] if len(scopes) > 1 else ""
    return module.removeprefix(_NO_MODULE), (classes[-1] if len(classes) > 1 else "")


def _unique(name: str, used: Counter[str]) -> str:
    used[name] += 1
    return name if used[name] == 1 else f"{name}_{used[name]}"


def _value_name(node: ir.Node, index: int) -> str:
    assert node.name is not None
    if len(node.outputs) == 1:
        return node.name
    outputs = OPS[node.op_type].outputs if node.domain == DOMAIN else ()
    return f"{node.name}/{outputs[index].name if outputs else index}"


def _name_constants(model: ir.Model) -> None:
    """Constants that torch numbered (val_24) are numbered afresh, in order of use, so that names are stable."""
    constants: dict[str, ir.Value] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.const_value is not None:
                constants.setdefault(str(value.name), value)
    for value in constants.values():
        model.graph.initializers.pop(str(value.name))
    for index, value in enumerate(constants.values()):
        value.name = f"constant.{index}"
        assert value.const_value is not None
        value.const_value.name = value.name
        model.graph.initializers[value.name] = value
