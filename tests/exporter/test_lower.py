"""The graph that TensorRT is given computes what the reference computes, and TensorRT-RTX takes it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from onnx_evaluator import OnnxEvaluator

from glm_export.exporter.build import build
from glm_export.exporter.compare import Comparison, Verdict
from glm_export.exporter.progress import Reporter
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.tensorrt.layers import read_layers
from glm_export.exporter.tensorrt.lower import lower
from glm_export.exporter.tensorrt.network import parse_network
from glm_export.exporter.validate import tolerances
from glm_export.exporter.weights import reference_of_bundle
from glm_export.plugins import torch_ops
from glm_export.plugins.cached_attention import reference as attention_reference
from glm_export.plugins.ops import OPS, TENSORRT_PLUGINS
from glm_export.plugins.schema import DOMAIN
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import UsageError
from glm_export.runtime.tensorrt_library import load_library

LAYERS, MOE_LAYERS = 4, 3
CAPACITY = 24
BATCH = 4

# New tokens per row and step: a ragged prefill in two chunks with idle rows, then decode steps with an idle row each.
COUNTS = np.array([[3, 1, 3, 2], [2, 0, 0, 3], [1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1]])
TOKENS_BN = np.random.default_rng(0).integers(0, 512, (BATCH, COUNTS.sum(0).max()))

every_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "fp8-head"])


def lowered(bundle, **choices):
    model = onnx.load(bundle.model_path, load_external_data=False)
    return lower(model, compute_dtype=bundle.manifest.contract.compute_dtype, capacity=CAPACITY, **choices)


def logits_of(bundle, model, *, fp8_cache=False):
    """Logits [steps, B, V] of a lowered graph; an idle row keeps those it had. Padding is token 0."""
    load_external_data_for_model(model, str(bundle.directory))
    contract = bundle.manifest.contract
    evaluator = OnnxEvaluator(model, contract, batch=BATCH, capacity=CAPACITY, fp8_cache=fp8_cache)
    found = []
    for counts in COUNTS:
        tokens = np.zeros((BATCH, counts.max()), np.int64)
        for row, (start, count) in enumerate(zip(evaluator.length, counts, strict=True)):
            tokens[row, :count] = TOKENS_BN[row, start : start + count]
        logits = evaluator.step(tokens, counts)
        found.append(np.where(counts[:, None] > 0, logits, found[-1] if found else np.nan))
    return np.stack(found)


def reference_logits(bundle, **choices):
    """The same from the reference, in one pass without a cache."""
    with torch.no_grad():
        logits_BNV = reference_of_bundle(bundle, **choices)(torch.tensor(TOKENS_BN)).logits.numpy()
    return np.stack([logits_BNV[np.arange(BATCH), end - 1] for end in COUNTS.cumsum(0)])


def judge(bundle, got, target):
    """The verdict of `glm-export validate` on logits of a lowered graph."""
    want = reference_logits(bundle)
    comparison = Comparison.of("lowered graph - reference", got, want)
    noise = Comparison.of("reference - its twin", reference_logits(bundle, permute_seed=0), want)
    overall, per_line = tolerances(bundle.manifest.precision, LAYERS, target)
    return Verdict.of(comparison, noise, overall=overall, per_line=per_line)


@pytest.fixture
def rounded_like_tensorrt(monkeypatch):
    """The reference rounds a 16-bit product before it adds the bias. (To scale by 1/4, as tiny does, is exact.)"""
    linear = torch_ops.linear

    def rounding_twice(x, weight, bias=None):
        y = linear(x, weight)
        return y if bias is None else (y.float() + bias).to(x.dtype)

    monkeypatch.setattr(torch_ops, "linear", rounding_twice)


@pytest.mark.parametrize("experts", ["plugin", "decomposed"])
@every_precision
def test_computes_what_the_reference_does(bundle_of, precision, experts):
    bundle = bundle_of(precision)
    verdict = judge(bundle, logits_of(bundle, lowered(bundle, experts=experts)), "tensorrt")
    assert verdict, verdict


@pytest.mark.usefixtures("rounded_like_tensorrt")
@every_precision
def test_nothing_else_differs(bundle_of, precision):
    # With the one rounding that is known to differ in the reference too, the tolerance of the main job holds; what is
    # left is one rounding of the logits to float16.
    bundle = bundle_of(precision)
    verdict = judge(bundle, logits_of(bundle, lowered(bundle)), "onnxruntime")
    assert verdict, verdict
    assert verdict.median < (1e-6 if precision == "fp32" else 2.0**-11)


def e4m3(x):
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


@pytest.fixture
def fp8_cached(monkeypatch):
    """The reference keeps keys and values in E4M3: it rotates, rounds, and attends with a rotation by nothing."""

    def attention(q, k, v, cos, sin, k_cache, v_cache, write_index, length, rotary_dim, scale):
        q, k = (attention_reference._rotate(x, cos, sin, rotary_dim).to(x.dtype) for x in (q, k))
        nothing = (torch.ones_like(cos), torch.zeros_like(sin))
        caches = (k_cache, v_cache, write_index, length)
        return attention_reference.cached_attention(q, e4m3(k), e4m3(v), *nothing, *caches, rotary_dim, scale)

    monkeypatch.setattr(torch_ops, "cached_attention", attention)


@pytest.mark.usefixtures("rounded_like_tensorrt", "fp8_cached")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_fp8_cache(bundle_of, precision):
    bundle = bundle_of(precision)
    model = lowered(bundle, cache_dtype="fp8")
    verdict = judge(bundle, logits_of(bundle, model, fp8_cache=True), "onnxruntime")
    assert verdict, verdict
    assert verdict.median < 2.0**-11
    kept = judge(bundle, logits_of(bundle, lowered(bundle)), "onnxruntime")
    assert not kept, "it makes no difference"


def nodes_of(model, op_type, op=""):
    """Nodes of a kind, of those inlined from an op."""
    found = [node for node in model.graph.node if node.op_type == op_type and op in node.name]
    assert found, (op_type, op)
    return found


def attribute(node, name):
    return next(a for a in node.attribute if a.name == name)


def constant(model, value):
    """The name of a new constant."""
    name = f"constant.of_test.{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    return name


def causal(kind):
    def mutate(model):
        for node in nodes_of(model, "TRT_Attention"):
            attribute(node, "causal_kind").s = kind

    return mutate


def keys_for_values(model):
    for node in nodes_of(model, "TRT_Attention"):
        node.input[2] = node.input[1]


def kv_length_is(name):
    def mutate(model):
        for node in nodes_of(model, "Cast", "CachedAttention"):
            if any(node.output[0] == attention.input[5] for attention in nodes_of(model, "TRT_Attention")):
                node.input[0] = name

    return mutate


def queries_unscaled(model):
    for node in nodes_of(model, "Mul", "CachedAttention"):
        node.input[1] = constant(model, 1)


def not_rotated(model):
    for node in nodes_of(model, "RotaryEmbedding"):
        node.op_type, node.input[:] = "Identity", node.input[:1]
        del node.attribute[:]


def written_at_the_start(model):
    for node in nodes_of(model, "TensorScatter"):
        del node.input[2:]


def no_correction_bias(model):
    for node in nodes_of(model, "MoERouter"):
        node.input[1] = constant(model, np.zeros(8))


def no_routed_scaling(model):
    for node in nodes_of(model, "MoERouter"):
        attribute(node, "routed_scaling_factor").f = 1.0


def no_bias(model):
    for node in nodes_of(model, "Add", "Linear"):
        node.input[1] = constant(model, 0)


def no_row_scale(model):
    for node in nodes_of(model, "Mul", "FP8Linear"):
        node.input[1] = constant(model, 1)


def activations_not_rounded(model):
    for node in nodes_of(model, "DequantizeLinear", "FP8Linear"):
        quantize = [q for q in nodes_of(model, "QuantizeLinear") if q.output[0] == node.input[0]]
        if quantize:
            node.op_type, node.input[:] = "Identity", quantize[0].input[:1]


MUTATIONS = {
    "upper_left": ("bf16", causal(b"upper_left")),
    "no_mask": ("bf16", causal(b"none")),
    "keys_for_values": ("bf16", keys_for_values),
    "kv_length_without_padding": ("bf16", kv_length_is("length")),
    "kv_length_without_new_tokens": ("bf16", kv_length_is("write_index")),
    "queries_unscaled": ("bf16", queries_unscaled),
    "not_rotated": ("bf16", not_rotated),
    "written_at_the_start": ("bf16", written_at_the_start),
    "no_correction_bias": ("bf16", no_correction_bias),
    "no_routed_scaling": ("bf16", no_routed_scaling),
    "no_bias": ("bf16", no_bias),
    "no_row_scale": ("fp8", no_row_scale),
    "activations_not_rounded": ("fp8", activations_not_rounded),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # where no key is left to see
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_graph_is_caught(bundle_of, mutation):
    precision, mutate = MUTATIONS[mutation]
    bundle = bundle_of(precision)
    model = lowered(bundle)
    mutate(model)
    got = logits_of(bundle, model)
    assert not np.isfinite(got).all() or not judge(bundle, got, "tensorrt")


@every_precision
def test_nodes_and_bindings(bundle_of, precision):
    bundle = bundle_of(precision)
    model = onnx.load(bundle.model_path, load_external_data=False)
    before = model.SerializeToString(deterministic=True)
    found = lower(model, compute_dtype=bundle.manifest.contract.compute_dtype, capacity=CAPACITY, cache_dtype="fp8")
    assert model.SerializeToString(deterministic=True) == before
    assert not found.functions
    assert found.graph.initializer == model.graph.initializer

    names = [node.name for node in found.graph.node]
    assert len(set(names)) == len(names)
    # Every node is one of before, or is called after one of before and what it does.
    calls = tuple(f"{node.name}/" for node in model.graph.node)
    assert all(f"{name}/".startswith(calls) for name in names)

    for ours, theirs in ((found.graph.input, model.graph.input), (found.graph.output, model.graph.output)):
        assert [value.name for value in ours] == [value.name for value in theirs]
        for value, old in zip(ours, theirs, strict=True):
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            old_dims = [d.dim_param or d.dim_value for d in old.type.tensor_type.shape.dim]
            assert dims == [CAPACITY if d == "C" else d for d in old_dims]
            cache = value.name.startswith(("k_cache", "v_cache"))
            want = onnx.TensorProto.FLOAT8E4M3FN if cache else old.type.tensor_type.elem_type
            assert value.type.tensor_type.elem_type == want

    plugins = [node for node in found.graph.node if node.domain == DOMAIN]
    experts = "FP8MoEExperts" if precision.startswith("fp8") else "MoEExperts"
    assert Counter(node.op_type for node in plugins) == {
        **{"MoERouter": MOE_LAYERS, experts: MOE_LAYERS, "FP8CacheWrite": 2 * LAYERS}
    }
    for node in plugins:
        assert node.op_type in TENSORRT_PLUGINS
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes.pop("plugin_namespace"), attributes.pop("plugin_version")) == (b"glm", b"1")
        assert set(attributes) == {a.name for a in OPS[node.op_type].attributes}


@pytest.mark.parametrize(
    ("precision", "choices"),
    [
        *(("fp32", {"decompose_attention": True}), ("bf16", {}), ("fp16", {}), ("fp8", {})),
        *(("bf16", {"experts": "decomposed"}), ("fp8", {"experts": "decomposed"})),
        *(("bf16", {"experts": "trt_moe"}), ("fp16", {"experts": "trt_moe"})),
        *(("bf16", {"cache_dtype": "fp8"}), ("fp8", {"cache_dtype": "fp8"})),
    ],
    ids=str,
)
def test_tensorrt_rtx_parses_it(bundle_of, precision, choices):
    bundle = bundle_of(precision)
    network = parse_network(load_library("tensorrt-rtx"), lowered(bundle, **choices), bundle)
    layers = read_layers(network).layers
    kinds = Counter(layer.kind for layer in layers)
    fp8_cache = choices.get("cache_dtype") == "fp8"
    experts = choices.get("experts", "plugin")
    routed = "FP8MoEExperts" if precision == "fp8" else "MoEExperts"
    plugins = {
        **({} if experts == "decomposed" else {"MoERouter": MOE_LAYERS}),
        **({routed: MOE_LAYERS} if experts == "plugin" else {}),
        **({"FP8CacheWrite": 2 * LAYERS} if fp8_cache else {}),
    }
    assert Counter(layer.plugin for layer in layers if layer.plugin) == plugins
    assert kinds["kv_cache_update"] == (0 if fp8_cache else 2 * LAYERS)
    assert kinds["moe"] == (MOE_LAYERS if experts == "trt_moe" else 0)
    attention = [layer for layer in layers if layer.causal]
    assert [(layer.causal, layer.kv_lengths) for layer in attention] == [("lower_right", True)] * LAYERS


def test_every_export_choice_parses(tiny_checkpoint, tmp_path):
    choices = {"logits": "all", "inputs_embeds": True, "outputs": ["hidden_states", "router_logits"]}
    recipe = load_recipe("tiny", {"precision": "bf16", **{f"export.{name}": value for name, value in choices.items()}})
    build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / "bundle", Reporter(quiet=True))
    bundle = Bundle.open(tmp_path / "bundle")
    network = parse_network(load_library("tensorrt-rtx"), lowered(bundle), bundle)
    outputs = [value.name for value in read_layers(network).outputs]
    assert outputs == [binding.name for binding in bundle.manifest.contract.outputs_of_step()]


def test_attentions_are_refused(bundle_of):
    model = onnx.load(bundle_of("bf16").model_path, load_external_data=False)
    model.graph.output.append(helper.make_tensor_value_info("attentions.0", onnx.TensorProto.FLOAT, ["B", 4, "S", "C"]))
    with pytest.raises(UsageError, match="returns attentions, which TensorRT's attention does not compute"):
        lower(model, compute_dtype="bfloat16", capacity=CAPACITY)


@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_trt_moe_is_refused_where_it_does_not_exist(bundle_of, precision):
    with pytest.raises(UsageError, match="TRT_MoE computes bf16 and fp16 experts only"):
        lowered(bundle_of(precision), experts="trt_moe")
