"""Registers a reference as a torch op of the `glm` namespace and derives its ONNX translation from the schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from onnxscript.values import Op, Opset

from glm_export.plugins.onnx_schema import onnx_schema
from glm_export.plugins.schema import DOMAIN, VERSION, OpSchema

TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""torch op overload -> function that emits its ONNX node, for torch.onnx.export(custom_translation_table=...)."""


P = ParamSpec("P")
R = TypeVar("R")


def define(schema: OpSchema, reference: Callable[P, R], fake: Callable[P, R]) -> Callable[P, R]:
    """Defines torch.ops.glm.<torch_name>.

    Args:
        schema: the op; the parameters of `reference` must be its inputs, then its attributes, by name.
        reference: computes the op on real tensors.
        fake: computes shapes and dtypes of the outputs on fake tensors.

    Returns:
        The op, called like `reference`.
    """
    expected = [t.name for t in schema.inputs] + [a.name for a in schema.attributes]
    for function in (reference, fake):
        assert list(inspect.signature(function).parameters) == expected, (schema.name, function)
    assert schema.torch_name, schema.name
    op = torch.library.custom_op(f"{DOMAIN}::{schema.torch_name}", reference, mutates_args=())
    op.register_fake(fake)
    TRANSLATIONS[getattr(torch.ops.glm, schema.torch_name).default] = _translation(schema)
    return op


def _translation(schema: OpSchema) -> Callable[..., Any]:
    """A function from the torch op's arguments to the ONNX node's outputs."""
    onnx_op = Op(Opset(DOMAIN, VERSION), schema.name, onnx_schema(schema))
    count = len(schema.inputs)
    names = [a.name for a in schema.attributes]

    def emit(*arguments: Any) -> Any:
        return onnx_op(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))

    return emit
