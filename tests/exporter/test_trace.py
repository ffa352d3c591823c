"""The graph of the tiny model, as it is before anything gives it weights."""

from __future__ import annotations

import functools
from collections import Counter

import onnx
import onnx_ir as ir
import pytest
import torch

from glm_export.exporter.config import Glm4MoeConfig, contract
from glm_export.exporter.layout import parameters
from glm_export.exporter.model import Glm4MoeForCausalLM
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.storage import stored_tensors
from glm_export.exporter.trace import trace
from glm_export.plugins.schema import DOMAIN
from glm_export.runtime.contract import Binding, Contract

TINY = load_recipe("tiny").model
TWO_LAYERS = TINY.with_layers(2)  # one dense, one MoE
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "fp8-head")
every_precision = pytest.mark.parametrize("precision", PRECISIONS)

ONNX_TYPES = {
    **{"float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16},
    **{"int64": ir.DataType.INT64, "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN},
}
ATTENTION = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
SILU_MUL = ("gate_proj", "up_proj", "down_proj")


@functools.cache
def traced(precision: str) -> ir.Model:
    return trace(TINY, precision, contract(TINY, precision=precision))


def two_layers(precision: str, *, config: Glm4MoeConfig = TWO_LAYERS, **choices: object) -> tuple[ir.Model, Contract]:
    chosen = contract(config, precision=precision, **choices)  # type: ignore[arg-type]
    return trace(config, precision, chosen), chosen


def ops(model: ir.Model) -> dict[str, list[ir.Node]]:
    """The glm nodes by op."""
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            found.setdefault(node.op_type, []).append(node)
    return found


def modules(nodes: list[ir.Node]) -> list[str]:
    return [node.metadata_props["source_module"] for node in nodes]


def input_names(node: ir.Node) -> list[str]:
    return [str(value.name) if value is not None else "" for value in node.inputs]


def number(node: ir.Node, name: str) -> object:
    return node.attributes[name].value


def expect_bindings(values: list[ir.Value] | tuple[ir.Value, ...], bindings: tuple[Binding, ...]) -> None:
    got = [(v.name, v.dtype, tuple(d if isinstance(d, int) else str(d) for d in v.shape or ())) for v in values]
    assert got == [(b.name, ONNX_TYPES[b.dtype], b.shape) for b in bindings]


@every_precision
def test_bindings_are_the_contract(precision: str) -> None:
    chosen = contract(TINY, precision=precision)
    expect_bindings(traced(precision).graph.inputs, chosen.inputs())
    expect_bindings(traced(precision).graph.outputs, chosen.outputs_of_step())


@every_precision
def test_ops_of_every_layer(precision: str) -> None:
    found = ops(traced(precision))
    layers = [f"model.layers.{i}" for i in range(4)]
    moe, dense = [f"{layer}.mlp" for layer in layers[1:]], f"{layers[0]}.mlp"
    projections = [f"{layer}.{name}" for layer in layers for name in ATTENTION]
    projections += [f"{mlp}.{name}" for mlp in (dense, *(f"{m}.shared_experts" for m in moe)) for name in SILU_MUL]
    gates = [f"{m}.gate" for m in moe]
    norms = [f"{layer}.{name}_layernorm" for layer in layers for name in ("input", "post_attention")]
    norms += [f"{layer}.self_attn.{letter}_norm" for layer in layers for letter in "qk"] + ["model.norm"]
    fp8 = precision in ("fp8", "fp8-head")
    products = {
        "fp8": {"Linear": [*gates, "lm_head"], "FP8Linear": projections},
        "fp8-head": {"Linear": gates, "FP8Linear": [*projections, "lm_head"]},
    }
    want = {
        "RMSNorm": norms,
        "CachedAttention": [f"{layer}.self_attn" for layer in layers],
        "SiluMul": [dense, *(f"{m}.shared_experts" for m in moe)],
        "ResidualAdd": [*layers, *layers, *moe],
        "MoERouter": gates,
        "FP8MoEExperts" if fp8 else "MoEExperts": [f"{m}.experts" for m in moe],
    } | products.get(precision, {"Linear": [*projections, *gates, "lm_head"]})
    assert {name: Counter(modules(nodes)) for name, nodes in found.items()} == {k: Counter(v) for k, v in want.items()}


@every_precision
def test_ops_read_the_parameters_of_their_module(precision: str) -> None:
    found = ops(traced(precision))
    for node in (*found["Linear"], *found.get("FP8Linear", ())):
        module = node.metadata_props["source_module"]
        bias = f"{module}.bias" if module.endswith(("q_proj", "k_proj", "v_proj")) else ""
        scale = [f"{module}.weight_scale"] if node.op_type == "FP8Linear" else []
        assert input_names(node)[1:] == [f"{module}.weight", *scale, bias]
    for node in found["RMSNorm"]:
        assert input_names(node)[1] == f"{node.metadata_props['source_module']}.weight"
    for node in found["MoERouter"]:
        assert input_names(node)[1] == f"{node.metadata_props['source_module']}.e_score_correction_bias"
    for node in found.get("MoEExperts", ()):
        module = node.metadata_props["source_module"]
        assert input_names(node)[3:] == [f"{module}.gate_up_proj", f"{module}.down_proj"]
    for node in found.get("FP8MoEExperts", ()):
        module = node.metadata_props["source_module"]
        names = [f"{module}.{half}_proj{kind}" for half in ("gate_up", "down") for kind in ("", "_scale")]
        assert input_names(node)[3:] == names


@every_precision
def test_router_is_float32(precision: str) -> None:
    for node in ops(traced(precision))["MoERouter"]:
        (linear,) = [n for n in ops(traced(precision))["Linear"] if modules([n]) == modules([node])]
        for value in (*linear.inputs[:2], *linear.outputs, *node.inputs, node.outputs[1]):
            assert value is not None
            assert value.dtype == ir.DataType.FLOAT
        assert node.outputs[0].dtype == ir.DataType.INT32


def test_attributes_are_those_of_the_config() -> None:
    found = ops(traced("fp8"))
    for node in found["MoERouter"]:
        assert {name: number(node, name) for name in node.attributes} == {
            "top_k": TINY.num_experts_per_tok,
            "n_group": TINY.n_group,
            "topk_group": TINY.topk_group,
            "norm_topk_prob": int(TINY.norm_topk_prob),
            "routed_scaling_factor": TINY.routed_scaling_factor,
        }
    for node in found["CachedAttention"]:
        assert {name: number(node, name) for name in node.attributes} == {"rotary_dim": 8, "scale": 0.25}
    for node in found["RMSNorm"]:
        assert number(node, "epsilon") == pytest.approx(TINY.rms_norm_eps, rel=2**-24)  # attributes are float32


def test_caches_are_bound_in_order() -> None:
    for i, node in enumerate(ops(traced("fp8"))["CachedAttention"]):
        assert input_names(node)[5:] == [f"k_cache.{i}", f"v_cache.{i}", "write_index", "length"]
        assert [value.name for value in node.outputs[1:]] == [f"k_cache_out.{i}", f"v_cache_out.{i}"]
        assert modules([node]) == [f"model.layers.{i}.self_attn"]


@every_precision
def test_initializers_are_the_stored_tensors_without_data(precision: str) -> None:
    want = {
        tensor.name: (tensor.shape, ONNX_TYPES[str(tensor.dtype).removeprefix("torch.")])
        for parameter in parameters(TINY).values()
        for tensor in stored_tensors(parameter, precision)
    }
    found = traced(precision).graph.initializers
    weights = {name: value for name, value in found.items() if value.const_value is None}
    assert {name: (tuple(v.shape or ()), v.dtype) for name, v in weights.items()} == want
    constants = {name: value.const_value for name, value in found.items() if value.const_value is not None}
    assert list(constants) == [f"constant.{i}" for i in range(len(constants))]
    # Shapes and indices, and one frequency per pair of rotated elements.
    assert all(value is not None and value.nbytes <= max(32, 4 * TINY.rotary_dim // 2) for value in constants.values())


@every_precision
def test_names_and_metadata_tell_the_module(precision: str) -> None:
    with torch.device("meta"):
        known = dict(Glm4MoeForCausalLM(TINY, precision).named_modules())
    model = traced(precision)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    for node in model.graph:
        module = node.metadata_props["source_module"]
        assert set(node.metadata_props) <= {"source_module", "source_op"}
        assert module in known
        assert str(node.name).startswith(f"{module}/{node.op_type}" if module else node.op_type)
        for value in node.outputs:
            assert value.is_graph_output() or str(value.name).startswith(str(node.name))
        if node.domain == DOMAIN:
            assert node.metadata_props["source_op"].startswith("glm.")
    outside = {node.op_type for node in model.graph if not node.metadata_props["source_module"]}
    assert not outside & {node.op_type for node in model.graph if node.domain == DOMAIN}


@every_precision
def test_no_trace_of_this_machine(precision: str) -> None:
    text = ir.to_proto(traced(precision)).SerializeToString()
    for word in (b".py", b"site-packages", b"/work", b"/home", b"/usr", b"Traceback", b"stack_trace", b"pkg.torch"):
        assert word not in text
    assert len(text) < 200_000


@every_precision
def test_versions_and_functions(precision: str) -> None:
    model = traced(precision)
    assert dict(model.opset_imports) == {"": 24, DOMAIN: 1}
    assert model.ir_version == 10
    used = {*ops(model)} | ({"FakeQuantizeRows"} if precision in ("fp8", "fp8-head") else set())
    assert {(domain, name) for domain, name, _ in model.functions} == {(DOMAIN, name) for name in used}
    assert {node.domain for node in model.graph} == {"", DOMAIN}
    for node in model.graph:
        assert node.domain or onnx.defs.has(node.op_type, 24, "")


@every_precision
def test_shapes_are_in_the_projects_letters(precision: str) -> None:
    for node in model_nodes(traced(precision)):
        for value in node.outputs:
            assert value.shape is not None
            assert value.dtype is not None
            assert all(isinstance(d, int) or str(d) in ("B", "S", "C", "T") for d in value.shape), (
                node.name,
                value.shape,
            )


def model_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.metadata_props["source_module"]]


def test_two_traces_are_the_same_bytes() -> None:
    first, second = (ir.to_proto(two_layers("fp8")[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_all_outputs_and_all_logits() -> None:
    model, chosen = two_layers("bf16", logits="all", outputs=("attentions", "router_logits", "hidden_states"))
    expect_bindings(model.graph.inputs, chosen.inputs())
    expect_bindings(model.graph.outputs, chosen.outputs_of_step())
    names = [str(value.name) for value in model.graph.outputs]
    assert names[0] == "logits"
    assert names[5:] == [
        *("hidden_states.0", "hidden_states.1", "hidden_states.2"),
        *("router_logits.1", "attentions.0", "attentions.1"),
    ]
    found = ops(model)
    (head,) = [node for node in found["Linear"] if modules([node]) == ["lm_head"]]
    assert head.outputs[0].is_graph_output()
    assert [value.name for node in found["CachedAttention"] for value in node.outputs[3:]] == names[-2:]
    producer = {value.name: value.producer() for value in model.graph.outputs}
    last = producer["hidden_states.2"]
    assert last is not None
    assert (last.op_type, last.metadata_props["source_module"]) == ("RMSNorm", "model.norm")
    first = producer["hidden_states.0"]
    assert first is not None
    assert first.metadata_props["source_module"] == "model.embed_tokens"
    router = producer["router_logits.1"]
    assert router is not None
    assert (router.op_type, router.metadata_props["source_module"]) == ("Linear", "model.layers.1.mlp.gate")


def test_attentions_are_not_computed_unless_asked_for() -> None:
    assert all(len(node.outputs) == 3 for node in ops(traced("fp32"))["CachedAttention"])
    body = next(f for key, f in traced("fp32").functions.items() if key[1] == "CachedAttention")
    assert len(body.outputs) == 3


def test_inputs_embeds_with_hidden_states() -> None:
    model, chosen = two_layers("fp8", inputs_embeds=True, outputs=("hidden_states",))
    expect_bindings(model.graph.inputs, chosen.inputs())
    expect_bindings(model.graph.outputs, chosen.outputs_of_step())
    assert model.graph.inputs[0].name == "inputs_embeds"
    assert "model.embed_tokens.weight" not in model.graph.initializers
    # ONNX wants a node between an input and an output, even where they are the same.
    first = next(value for value in model.graph.outputs if value.name == "hidden_states.0").producer()
    assert first is not None
    assert (first.op_type, first.name, input_names(first)) == ("Identity", "Identity", ["inputs_embeds"])


@every_precision
def test_head_sees_the_last_tokens_only(precision: str) -> None:
    products = ops(traced(precision))["FP8Linear" if precision == "fp8-head" else "Linear"]
    (head,) = [node for node in products if modules([node]) == ["lm_head"]]
    assert [str(d) for d in head.outputs[0].shape or ()] == ["B", "1", "512"]
    assert head.inputs[0] is not None
    assert head.inputs[0].dtype == head.outputs[0].dtype == ir.DataType.FLOAT


def test_other_architectures() -> None:
    overrides = {"use_qk_norm": False, "attention_bias": False, "first_k_dense_replace": 0, "tie_word_embeddings": True}
    config = load_recipe("tiny", {f"model.{key}": value for key, value in overrides.items()}).model.with_layers(2)
    model, chosen = two_layers("bf16", config=config)
    expect_bindings(model.graph.inputs, chosen.inputs())
    found = ops(model)
    assert Counter(modules(found["RMSNorm"])) == Counter(
        [*(f"model.layers.{i}.{n}_layernorm" for i in range(2) for n in ("input", "post_attention")), "model.norm"]
    )
    assert len(found["MoERouter"]) == len(found["MoEExperts"]) == 2
    assert all(input_names(node)[2:] in ([], [""]) for node in found["Linear"])
    # The head has its own name; build.py points it to the embedding's bytes.
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(model.graph.initializers)
