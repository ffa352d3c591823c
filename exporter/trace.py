"""config + precision + contract -> the ONNX graph, without a single weight in memory.

The reference model is exported on fake tensors, one engine step with the contract's inputs and outputs, then cleaned
up, named and given the ops' portable bodies. Initializers stay without data: build.py points them to their files.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.model import Glm4MoeForCausalLM
from glm_export.exporter.naming import name_after_modules
from glm_export.plugins.bodies import OPSET, portable_functions
from glm_export.plugins.ops import OPS
from glm_export.plugins.schema import DOMAIN
from glm_export.plugins.torch_ops import TRANSLATIONS
from glm_export.runtime.contract import Binding, Contract

_ONNX_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
    "int64": ir.DataType.INT64,
}

IR_VERSION = 10
"""The oldest that has everything we use (FP8, functions in opset 24), so that most tools open the file."""


class Step(Glm4MoeForCausalLM):
    """One engine step: the model with the contract's flat inputs and outputs."""

    def __init__(self, config: Glm4MoeConfig, precision: str, contract: Contract) -> None:
        super().__init__(config, precision)
        self.contract = contract

    def forward(  # type: ignore[override]
        self, tokens: Tensor, write_index: Tensor, length: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """Takes and returns what the contract's tables list, in their order."""
        last = self.contract.logits == "last"
        # The last valid token of each row; an idle row (nothing new) gets some token's logits, which nobody reads.
        last_B1 = (length - write_index - 1).clamp(min=0).unsqueeze(1)
        output = super().forward(
            None if self.contract.inputs_embeds else tokens,
            inputs_embeds=tokens if self.contract.inputs_embeds else None,
            caches=tuple(zip(caches[::2], caches[1::2], strict=True)),
            write_index=write_index,
            length=length,
            logits_to_keep=last_B1 if last else 0,
        )
        optional = {name: getattr(output, name) for name in self.contract.outputs}
        return (
            output.logits.squeeze(1) if last else output.logits,
            *(cache for pair in output.caches for cache in pair),
            *(tensor for name in optional for tensor in optional[name]),
        )


def trace(config: Glm4MoeConfig, precision: str, contract: Contract) -> ir.Model:
    """The graph of one step, opset 24, with free dimensions B, S and C.

    Initializers have names, shapes and dtypes but no data, except for the few constants of a handful of bytes.
    """
    with FakeTensorMode(), torch.no_grad():
        step = Step(config, precision, contract).eval()
        free = {"B": torch.export.Dim("B"), "S": torch.export.Dim("S"), "C": torch.export.Dim("C")}
        inputs = contract.inputs()
        arguments = tuple(_example(binding) for binding in inputs)
        dynamic = tuple({axis: free[d] for axis, d in enumerate(b.shape) if isinstance(d, str)} for b in inputs)
        with _quiet():
            program = torch.export.export(step, arguments, dynamic_shapes=(*dynamic[:3], dynamic[3:]), strict=False)
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=TRANSLATIONS,
                optimize=False,
                verify=False,
                verbose=False,
            )
    assert exported is not None
    model = exported.model
    _clean(model)
    _spell_out_absent_inputs(model)
    _drop_unused_attentions(model)
    _bind(model, contract)
    name_after_modules(model)
    _add_bodies(model, contract)
    return model


def _example(binding: Binding) -> Tensor:
    # Sizes that differ from each other and from 1, so that no two free dimensions are taken for one.
    sizes = {"B": 2, "S": 3, "C": 5}
    shape = [sizes[d] if isinstance(d, str) else d for d in binding.shape]
    return torch.zeros(shape, dtype=getattr(torch, binding.dtype))


def _clean(model: ir.Model) -> None:
    """Folds shape arithmetic into constants and merges what is computed twice."""
    for initializer in model.graph.initializers.values():
        initializer.const_value = None  # a fake tensor, which no pass can look into
    optimizer.fold_constants(model, onnx_shape_inference=True)
    with _quiet():  # the passes remark on every initializer without data
        ir.passes.Sequential(
            passes.RemoveUnusedNodesPass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.OutputFixPass(),  # hidden_states.0 would be inputs_embeds itself
        )(model)


def _spell_out_absent_inputs(model: ir.Model) -> None:
    """Gives every op node all inputs of its schema: the ONNX reference evaluator does not fill up a function's."""
    for node in model.graph:
        if node.domain == DOMAIN:
            node.resize_inputs(len(OPS[node.op_type].inputs))


def _drop_unused_attentions(model: ir.Model) -> None:
    """Leaves out CachedAttention's optional output where nobody reads it, so that no engine computes it."""
    for node in model.graph:
        if node.op_type == "CachedAttention" and not node.outputs[3].uses() and not node.outputs[3].is_graph_output():
            node.resize_outputs(3)


def _bind(model: ir.Model, contract: Contract) -> None:
    """Gives inputs and outputs the contract's names and free dimensions theirs."""
    symbols: dict[str, str] = {}
    for value, binding in zip(model.graph.inputs, contract.inputs(), strict=True):
        assert value.shape is not None
        symbols |= {str(seen): d for seen, d in zip(value.shape, binding.shape, strict=True) if isinstance(d, str)}
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(d, symbols) for d in value.shape])
    for bindings, values in (
        (contract.inputs(), model.graph.inputs),
        (contract.outputs_of_step(), model.graph.outputs),
    ):
        for value, binding in zip(values, bindings, strict=True):
            value.name = binding.name
            value.shape = ir.Shape(binding.shape)
            assert value.dtype == _ONNX_DTYPES[binding.dtype], binding


def _renamed(dim: int | ir.SymbolicDim, symbols: dict[str, str]) -> int | str:
    if isinstance(dim, int):
        return dim
    # Sizes that depend on data keep torch's expression; the product of batch and sequence is the project's T.
    expression = str(dim)
    for seen, letter in symbols.items():
        expression = expression.replace(seen, letter)
    return "T" if expression == "B*S" else expression


def _add_bodies(model: ir.Model, contract: Contract) -> None:
    """Puts in the portable bodies, those that this graph uses."""
    for proto in portable_functions(compute_dtype=contract.compute_dtype, attentions="attentions" in contract.outputs):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    passes.RemoveUnusedFunctionsPass()(model)
    model.ir_version = IR_VERSION
    model.producer_name = "glm-export"
    model.producer_version = None
    model.graph.name = "glm4_moe_step"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report their own deprecations and which optional packages they do without."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
