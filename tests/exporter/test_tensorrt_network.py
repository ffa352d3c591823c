"""The parsed network: what every precision must have in it, and that whatever is missing is named."""

import dataclasses
import re
from collections.abc import Callable

import onnx
import pytest

from glm_export.exporter.recipe import Engine
from glm_export.exporter.tensorrt.builder import EngineChoices, lowered_model, lowered_network
from glm_export.exporter.tensorrt.check import check_network, fp8_products
from glm_export.exporter.tensorrt.layers import Layer, Layers, Value
from glm_export.exporter.tensorrt.network import parse_network
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import BackendError, IntegrityError
from glm_export.runtime.tensorrt_library import load_library

BundleOf = Callable[[str], Bundle]
LAYERS, MOE_LAYERS = 4, 3  # of the tiny model
LINEARS = 7  # of each layer: q, k, v, o; gate, up, down of the dense MLP or of the shared experts
C = 64


def choices(cache_dtype: str = "compute") -> EngineChoices:
    return EngineChoices(target="tensorrt-rtx", batch=2, capacity=C, engine=Engine(cache_dtype=cache_dtype))


def graph(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.model_path, load_external_data=False)


@pytest.mark.parametrize(
    ("precision", "cache_dtype"), [("bf16", "compute"), ("fp16", "compute"), ("fp8", "compute"), ("fp8", "fp8")]
)
def test_a_network_has_what_its_model_must_have(bundle_of: BundleOf, precision: str, cache_dtype: str) -> None:
    bundle = bundle_of(precision)
    library = load_library("tensorrt-rtx")
    network, layers, counts = lowered_network(library, bundle, graph(bundle), choices(cache_dtype))
    expected = {
        "MoERouter": MOE_LAYERS,
        "FP8MoEExperts" if precision == "fp8" else "MoEExperts": MOE_LAYERS,
        "FP8CacheWrite" if cache_dtype == "fp8" else "kv_cache_update": 2 * LAYERS,
        "attention": LAYERS,
    }
    assert counts == expected | ({"fp8_gemm": LINEARS * LAYERS} if precision == "fp8" else {})
    compute = {"bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}[precision]
    cache = "float8_e4m3fn" if cache_dtype == "fp8" else compute
    J, A, V = 2, 16, 512
    assert layers.inputs[:3] == (
        Value(name="input_ids", dtype="int64", shape=(-1, -1)),
        Value(name="write_index", dtype="int64", shape=(-1,)),
        Value(name="length", dtype="int64", shape=(-1,)),
    )
    assert {(v.dtype, v.shape) for v in layers.inputs[3:]} == {(cache, (-1, J, C, A))}
    assert layers.outputs[0] == Value(name="logits", dtype="float32", shape=(-1, V))
    for layer in layers.layers:
        if layer.kind == "attention_input":
            assert (layer.causal, layer.kv_lengths) == ("lower_right", True)
            assert {value.dtype for value in layer.inputs[:3] if value} == {compute}
        if layer.plugin == "MoERouter":
            assert [value and value.dtype for value in layer.inputs] == ["float32", "float32"]
    weights = [tensor for tensor in graph(bundle).graph.initializer if tensor.external_data]
    assert network.weight_bytes == sum(
        int(entry.value) for tensor in weights for entry in tensor.external_data if entry.key == "length"
    )


def test_every_fp8_linear_is_an_fp8_product(bundle_of: BundleOf) -> None:
    bundle = bundle_of("fp8")
    _, layers, _ = lowered_network(load_library("tensorrt-rtx"), bundle, graph(bundle), choices())
    names = [node.input[1] for node in graph(bundle).graph.node if node.op_type == "FP8Linear"]
    assert len(names) == LINEARS * LAYERS
    assert sorted(fp8_products(layers).values()) == sorted(names)


def test_a_graph_without_weights_is_parsed_too(bundle_of: BundleOf) -> None:
    whole = bundle_of("fp8")
    bare = Bundle(directory=whole.directory, manifest=dataclasses.replace(whole.manifest, weights=False))
    _, layers, _ = lowered_network(load_library("tensorrt-rtx"), bare, graph(bare), choices())
    assert layers == lowered_network(load_library("tensorrt-rtx"), whole, graph(whole), choices())[1]


# A network that is not what it must be


@pytest.fixture(scope="module")
def parsed(bundle_of: BundleOf) -> Layers:
    bundle = bundle_of("fp8")
    return lowered_network(load_library("tensorrt-rtx"), bundle, graph(bundle), choices())[1]


Q = "model.layers.2.self_attn.q_proj"


def without(layers: Layers, dropped: Callable[[Layer], bool]) -> Layers:
    kept = tuple(layer for layer in layers.layers if not dropped(layer))
    assert len(kept) < len(layers.layers)
    return dataclasses.replace(layers, layers=kept)


def changed(layers: Layers, chosen: Callable[[Layer], bool], **fields: object) -> Layers:
    result = tuple(dataclasses.replace(layer, **fields) if chosen(layer) else layer for layer in layers.layers)
    assert result != layers.layers
    return dataclasses.replace(layers, layers=result)


def of(name: str, kind: str) -> Callable[[Layer], bool]:
    return lambda layer: layer.name.startswith(name) and kind in (layer.kind, layer.plugin)


def unquantized(layers: Layers, weight: bool) -> Layers:
    """One product with an operand that was never FP8."""
    (constant,) = (layer for layer in layers.layers if layer.name == f"{Q}.weight")

    def chosen(layer: Layer) -> bool:
        of_weight = layer.inputs[:1] == constant.outputs
        return of(f"{Q}/FP8Linear/", "dequantize")(layer) and of_weight == weight

    (layer,) = filter(chosen, layers.layers)
    assert layer.inputs[0]
    plain = dataclasses.replace(layer.inputs[0], dtype="bfloat16")
    return changed(layers, chosen, inputs=(plain, *layer.inputs[1:]))


DEFECTS: dict[str, tuple[Callable[[Layers], Layers], str]] = {
    "no router": (lambda n: without(n, of("model.layers.1.", "MoERouter")), "layer 1 has no MoERouter"),
    "no experts": (lambda n: without(n, of("model.layers.3.", "FP8MoEExperts")), "layer 3 has no FP8MoEExperts"),
    "16-bit experts": (lambda n: changed(n, of("model.layers.3.", "FP8MoEExperts"), plugin="MoEExperts"), "layer 3"),
    "no cache update": (
        lambda n: without(
            n, lambda layer: layer.kind == "kv_cache_update" and layer.outputs[0].name == "v_cache_out.2"
        ),
        "no KV_CACHE_UPDATE writes v_cache.2 into v_cache_out.2",
    ),
    "other mask": (
        lambda n: changed(n, of("model.layers.0.", "attention_input"), causal="upper_left"),
        "layer 0 has no lower-right causal attention with lengths",
    ),
    "no mask": (lambda n: changed(n, of("model.layers.0.", "attention_input"), causal="none"), "layer 0 has no lower"),
    "no lengths": (
        lambda n: changed(n, of("model.layers.1.", "attention_input"), kv_lengths=False),
        "layer 1 has no lower-right causal attention with lengths",
    ),
    "activations in 16 bits": (lambda n: unquantized(n, weight=False), f"{Q}.weight is not multiplied in FP8"),
    "weights in 16 bits": (lambda n: unquantized(n, weight=True), f"{Q}.weight is not multiplied in FP8"),
    "input of another dtype": (
        lambda n: dataclasses.replace(n, inputs=(dataclasses.replace(n.inputs[0], dtype="int32"), *n.inputs[1:])),
        "its inputs are not those of the contract, as to input_ids in int32",
    ),
    "output that is missing": (
        lambda n: dataclasses.replace(n, outputs=n.outputs[1:]),
        "its outputs are not those of the contract, as to logits in float32",
    ),
}


def check(layers: Layers, bundle: Bundle) -> None:
    fp8 = [node.input[1] for node in graph(bundle).graph.node if node.op_type == "FP8Linear"]
    check_network(layers, bundle.manifest.contract, fp8_weights=fp8, cache_dtype="bfloat16")


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_named(name: str, parsed: Layers, bundle_of: BundleOf) -> None:
    change, sentence = DEFECTS[name]
    check(parsed, bundle_of("fp8"))
    with pytest.raises(BackendError, match=re.escape(sentence)) as caught:
        check(change(parsed), bundle_of("fp8"))
    assert "more" not in str(caught.value)  # nothing else is wrong


def test_many_defects_are_one_sentence(parsed: Layers, bundle_of: BundleOf) -> None:
    with pytest.raises(BackendError, match="; and 25 more"):
        check(without(parsed, lambda layer: layer.kind == "quantize"), bundle_of("fp8"))


# A graph that the parser does not take


def refused(model: onnx.ModelProto, bundle: Bundle) -> str:
    with pytest.raises((BackendError, IntegrityError)) as caught:
        parse_network(load_library("tensorrt-rtx"), model, bundle)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_plugin_that_is_missing_is_named(bundle_of: BundleOf) -> None:
    bundle = bundle_of("fp8")
    model = lowered_model(bundle, graph(bundle), choices())
    router = next(node for node in model.graph.node if node.op_type == "MoERouter")
    router.op_type = "MoERuoter"
    found = refused(model, bundle)
    assert "tensorrt-rtx 1." in found
    assert router.name in found
    assert "MoERuoter" in found


@pytest.mark.parametrize(("key", "value"), [("offset", 1 << 40), ("length", 64)])
def test_a_weight_outside_its_file(bundle_of: BundleOf, key: str, value: int) -> None:
    bundle = bundle_of("fp8")
    model = lowered_model(bundle, graph(bundle), choices())
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"{Q}.weight")
    next(entry for entry in tensor.external_data if entry.key == key).value = str(value)
    assert f"{Q}.weight should be 4096 bytes at" in refused(model, bundle)
