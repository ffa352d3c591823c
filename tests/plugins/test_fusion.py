"""The pass that fuses: what becomes of a layer, what is left alone, and that no number changes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import cpu_tools
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from glm_export.exporter.build import build
from glm_export.exporter.progress import Reporter
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.plugins import fusion
from glm_export.plugins.fusion import fuse
from glm_export.plugins.library import forced_cpu
from glm_export.plugins.ops import FUSED, OPS
from glm_export.runtime import session as runtime_session
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.generate import decode_step, prefill
from glm_export.runtime.open import open_session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
Change = "Callable[[onnx.GraphProto], object]"


def graph_of(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.model_path, load_external_data=False)


def ops_of(model: onnx.ModelProto, module: str = "") -> list[str]:
    """The ops of the nodes whose names begin with a module's."""
    return [node.op_type for node in model.graph.node if node.name.startswith(module)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nodes_of_a_layer(bundle_of: Callable[[str], Bundle], precision: str) -> None:
    model = graph_of(bundle_of(precision))
    fuse(model, FUSED)
    fp8 = "FP8" if precision == "fp8" else ""
    norms = ["RMSNorm", "RMSNorm"]  # of queries and keys
    assert ops_of(model, "model.layers.2.") == [f"{fp8}QkvLinear", *norms, f"{fp8}AttentionBlock", f"{fp8}MoEBlock"]
    dense = [f"{fp8}Linear", f"{fp8}Linear", "SiluMul", f"{fp8}Linear"]
    assert ops_of(model, "model.layers.0.mlp") == dense
    # The sum and the norm after a dense layer, and the norm that comes first of all, are nodes of their own.
    assert Counter(ops_of(model))["RMSNorm"] == 4 * len(norms) + 2
    assert Counter(ops_of(model))["ResidualAdd"] == 1
    assert ops_of(model, "model.norm") == []
    assert model.graph.node[-1].op_type == "Logits"
    assert "Squeeze" not in ops_of(model)[-3:]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fused_graph_is_a_model(bundle_of: Callable[[str], Bundle], precision: str) -> None:
    model = graph_of(bundle_of(precision))
    before = onnx.ModelProto()
    before.CopyFrom(model)
    fuse(model, FUSED)
    assert (model.graph.input, model.graph.output) == (before.graph.input, before.graph.output)
    given = {tensor.name for tensor in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:  # in order, and nothing is read that nobody writes
        assert {name for name in node.input if name} <= given, node.name
        given.update(node.output)
    assert {value.name for value in model.graph.output} <= given
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    fuse(before, ())
    assert Counter(ops_of(before)) == Counter(ops_of(graph_of(bundle_of(precision))))


@pytest.mark.parametrize("name", ["QkvLinear", "AttentionBlock", "MoEBlock", "Logits"])
def test_only_what_has_a_kernel_is_put_in(bundle_of: Callable[[str], Bundle], name: str) -> None:
    model = graph_of(bundle_of("bf16"))
    fuse(model, (name, "Linear"))
    assert set(ops_of(model)) & set(FUSED) == {name}


def reads_elsewhere(value: str) -> Change:
    return lambda graph: graph.node.append(helper.make_node("Identity", [value], ["seen"])) or shows("seen")(graph)


def shows(value: str) -> Change:
    return lambda graph: graph.output.append(helper.make_tensor_value_info(value, TensorProto.BFLOAT16, None))


def captures(value: str) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        inner = helper.make_graph(
            [helper.make_node("Identity", [value], ["inner"])],
            "branch",
            [],
            [helper.make_tensor_value_info("inner", TensorProto.BFLOAT16, None)],
        )
        graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
        graph.node.append(helper.make_node("If", ["yes"], ["seen"], then_branch=inner, else_branch=inner))
        shows("seen")(graph)

    return change


def retypes(weight: str, kind: int) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == weight)
        tensor.data_type = kind

    return change


def reshapes(value: str, *shape: int | str) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        (found,) = (info for info in graph.value_info if info.name == value)
        kind = found.type.tensor_type.elem_type
        found.CopyFrom(helper.make_tensor_value_info(value, kind, shape or None))

    return change


def swaps(name: str) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        (node,) = (node for node in graph.node if node.name == name)
        node.input[:2] = [node.input[1], node.input[0]]

    return change


def computes(weight: str) -> Change:
    """The weight comes from a node in the middle of what would be fused."""

    def change(graph: onnx.GraphProto) -> None:
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == weight)
        tensor.name = "stored"
        graph.value_info.append(helper.make_tensor_value_info(weight, tensor.data_type, tensor.dims))
        at = next(i for i, node in enumerate(graph.node) if weight in node.input)
        graph.node.insert(at, helper.make_node("Identity", ["stored"], [weight]))

    return change


LAYER = "model.layers.1"
SHARED = f"{LAYER}.mlp.shared_experts"
Q = f"{LAYER}.self_attn/Reshape"  # its first one is that of the queries
LEFT_ALONE = {
    "q_is_shown": ("QkvLinear", shows(f"{LAYER}.self_attn.q_proj/Linear")),
    "q_is_read_elsewhere": ("QkvLinear", reads_elsewhere(f"{LAYER}.self_attn.q_proj/Linear")),
    "q_is_captured": ("QkvLinear", captures(f"{LAYER}.self_attn.q_proj/Linear")),
    "q_has_no_declared_shape": ("QkvLinear", reshapes(Q)),
    "q_has_other_heads": ("QkvLinear", reshapes(Q, "B", "S", 8, 8)),
    "q_is_turned_round": ("QkvLinear", reshapes(Q, "S", "B", 4, 16)),
    "q_is_float16": ("QkvLinear", retypes(f"{LAYER}.self_attn.q_proj.weight", TensorProto.FLOAT16)),
    "k_is_computed_later": ("QkvLinear", computes(f"{LAYER}.self_attn.k_proj.weight")),
    "norm_is_bfloat16": ("AttentionBlock", retypes(f"{LAYER}.post_attention_layernorm.weight", TensorProto.BFLOAT16)),
    "norm_is_computed": ("AttentionBlock", computes(f"{LAYER}.post_attention_layernorm.weight")),
    "attention_is_shown": ("AttentionBlock", shows(f"{LAYER}.self_attn/CachedAttention/out")),
    "residual_is_added_to": ("AttentionBlock", swaps(f"{LAYER}/ResidualAdd")),
    "next_norm_is_float16": ("MoEBlock", retypes("model.layers.2.input_layernorm.weight", TensorProto.FLOAT16)),
    "router_logits_are_shown": ("MoEBlock", shows(f"{LAYER}.mlp.gate/Linear")),
    "head_has_more_tokens": ("Logits", reshapes("GatherElements", "B", 2, 64)),
    "head_has_no_declared_shape": ("Logits", reshapes("GatherElements")),
    "head_is_read_elsewhere": ("Logits", reads_elsewhere("lm_head/Linear")),
    "router_is_bfloat16": ("MoEBlock", retypes(f"{LAYER}.mlp.gate.weight", TensorProto.BFLOAT16)),
    "shared_before_routed": ("MoEBlock", swaps(f"{LAYER}.mlp/ResidualAdd")),
    "shared_expert_is_float16": (
        "MoEBlock",
        retypes(f"{LAYER}.mlp.shared_experts.up_proj.weight", TensorProto.FLOAT16),
    ),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_left_alone(bundle_of: Callable[[str], Bundle], what: str) -> None:
    name, change = LEFT_ALONE[what]
    whole, changed = graph_of(bundle_of("bf16")), graph_of(bundle_of("bf16"))
    change(changed.graph)
    before = ops_of(changed)
    for model in (whole, changed):
        fuse(model, (name,))
    # One place is no longer fused, and is as it was.
    assert ops_of(changed).count(name) == ops_of(whole).count(name) - 1
    within = {
        "QkvLinear": ("Linear", 3),
        "AttentionBlock": ("CachedAttention", 1),
        "MoEBlock": ("MoEExperts", 1),
        "Logits": ("Squeeze", 1),
    }
    fused, each = within[name]
    assert ops_of(changed).count(fused) == before.count(fused) - each * ops_of(changed).count(name)


def test_finite_logits_are_known_from_the_kernel(
    bundle_of: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[np.ndarray[Any, Any]] = []
    monkeypatch.setattr(runtime_session, "all_finite", lambda x: asked.append(x) or True)
    with open_session(bundle_of("fp8"), batch=2, capacity=8, threads=1) as session:
        prefill(session, [[1, 2, 3], [4]])
        assert np.isfinite(decode_step(session, [5, 6])).all()
        assert asked == []
        cache = session.cache("v_cache.0")
        cache[0, :, 0] = np.nan
        logits_BV = decode_step(session, [7, 8])
        assert len(asked) == 1
        assert np.isnan(logits_BV[0]).all()
        assert np.isfinite(logits_BV[1]).all()


def test_roles_are_told_by_the_edges(bundle_of: Callable[[str], Bundle]) -> None:
    model = graph_of(bundle_of("bf16"))
    swaps(f"{SHARED}/SiluMul")(model.graph)
    fuse(model, ("MoEBlock",))
    (block,) = (node for node in model.graph.node if node.name == f"{LAYER}.mlp/MoEBlock")
    roles = dict(zip((x.name for x in OPS["MoEBlock"].inputs), block.input, strict=True))
    assert roles["shared_gate"] == f"{SHARED}.up_proj.weight"
    assert roles["shared_up"] == f"{SHARED}.gate_proj.weight"
    assert roles["down"] == f"{LAYER}.mlp.experts.down_proj"


def logits_and_extras(bundle: Bundle) -> list[np.ndarray[Any, Any]]:
    """Everything that a ragged prefill in two chunks and two decode steps return, and the caches at the end."""
    with open_session(bundle, batch=3, capacity=48, threads=2) as session:
        found = [prefill(session, [[1, 2, 3, 4, 5, 6, 7], [60], [3, 1, 4]]), decode_step(session, [5, None, 9])]
        found.append(decode_step(session, [1, 2, 3]))
        out = session.step(np.array([[7, 8], [9, 1], [2, 3]]))
        found += [out.logits, *out.extras.values(), *(session.cache(b.name) for b in session.contract.caches())]
        return [np.array(x) for x in found]


def expect_the_same(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = logits_and_extras(bundle)
    monkeypatch.setattr(fusion, "fused", lambda graph, ops: graph)
    for one, other in zip(fused, logits_and_extras(bundle), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_no_number_changes(
    bundle_of: Callable[[str], Bundle], precision: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cpu_tools.machine_has(isa):
        pytest.skip(f"this machine has no {isa}")
    with forced_cpu(isa):
        expect_the_same(bundle_of(precision), monkeypatch)


def test_outputs_within_a_layer(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(outputs: list[str]) -> tuple[Bundle, onnx.ModelProto]:
        recipe = load_recipe("tiny", {"precision": "bf16", "export.outputs": outputs})
        build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / outputs[-1], Reporter(quiet=True))
        bundle = Bundle.open(tmp_path / outputs[-1])
        model = graph_of(bundle)
        fuse(model, FUSED)
        return bundle, model

    # Hidden states are the sums within blocks, and results of those.
    bundle, model = built(["hidden_states"])
    assert Counter(op for op in ops_of(model) if op in FUSED) == {
        **{"QkvLinear": 4, "AttentionBlock": 4, "MoEBlock": 3, "Logits": 1}
    }
    expect_the_same(bundle, monkeypatch)
    bundle, model = built(["hidden_states", "router_logits", "attentions"])
    # Router logits come from within a MoEBlock, probabilities from within an AttentionBlock.
    assert Counter(op for op in ops_of(model) if op in FUSED) == {"QkvLinear": 4, "Logits": 1}
    monkeypatch.undo()
    expect_the_same(bundle, monkeypatch)


def test_portable_sessions_have_the_graph_as_it_is(
    bundle_of: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []

    def record(graph: bytes, ops: tuple[str, ...]) -> bytes:
        seen.append(ops)
        return graph

    monkeypatch.setattr(fusion, "fused", record)
    with forced_cpu("portable"):
        open_session(bundle_of("fp32"), threads=1).close()
    assert seen == []
    with open_session(bundle_of("fp32"), threads=1) as session:
        assert seen == [session.kernels.ops]  # type: ignore[attr-defined]
        assert set(FUSED) <= set(seen[0])
