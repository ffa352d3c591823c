"""What a model's network must contain: TensorRT falls back without a word, so each thing is looked for by name.

A plugin that is not loaded becomes its function body; a quantized product whose operands do not both come out of a
DequantizeLinear runs in 16 bits; an attention with another mask reads other keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from glm_export.exporter.tensorrt.layers import Layer, Layers, Value
from glm_export.runtime.contract import Binding, Contract
from glm_export.runtime.errors import BackendError

FP8 = "float8_e4m3fn"
_SHOWN = 3
_VIEWS = ("shuffle", "identity", "cast", "squeeze", "unsqueeze")
"""Layers behind which a value is still the same one."""


def check_network(
    network: Layers, contract: Contract, *, fp8_weights: Collection[str], cache_dtype: str, experts: str = "plugin"
) -> dict[str, int]:
    """Checks that a parsed network has every layer that its model must have.

    Args:
        network: the layers as they were parsed.
        contract: of the model.
        fp8_weights: names of the matrices [O,I] that must be multiplied in FP8.
        cache_dtype: numpy's name of the dtype of the caches.
        experts: `plugin`, or `trt_moe` for TensorRT's own layer.

    Returns:
        How many layers there are of each kind that was looked for.

    Raises:
        BackendError: something is missing; the sentence says which.
    """
    graph = _Graph(network)
    fp8 = bool(fp8_weights)
    problems = [
        *_bindings(network, contract, cache_dtype),
        *_caches(network, contract, cache_dtype),
        *_attentions(graph, contract),
        *_experts(graph, contract, ("FP8MoEExperts" if fp8 else "MoEExperts") if experts == "plugin" else None),
        *(f"{name} is not multiplied in FP8" for name in sorted(set(fp8_weights) - set(graph.fp8_products.values()))),
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BackendError(
            f"The parsed network is not what the model needs: {'; '.join(problems[:_SHOWN])}{more}. Use a version of "
            "the library that this glm-export was made for."
        )
    kinds = ("kv_cache_update", "moe")
    counts = {kind: sum(layer.kind == kind for layer in network.layers) for kind in kinds}
    counts["attention"] = len(graph.attentions)
    counts["fp8_gemm"] = len(graph.fp8_products)
    for layer in network.layers:
        if layer.plugin:
            counts[layer.plugin] = counts.get(layer.plugin, 0) + 1
    return {kind: count for kind, count in counts.items() if count}


def fp8_products(network: Layers) -> dict[str, str]:
    """The products of which both operands are FP8: name of the layer -> name of the weight."""
    return _Graph(network).fp8_products


class _Graph:
    """Who makes which value, and what is found by following values back."""

    def __init__(self, network: Layers) -> None:
        self.layers = network.layers
        self._maker = {value.name: layer for layer in network.layers for value in layer.outputs}
        self.attentions = [layer for layer in network.layers if layer.kind == "attention_input"]
        self.fp8_products = {
            layer.name: weight
            for layer in network.layers
            if layer.kind == "matrix_multiply"
            for weight in self._fp8_weight(layer)
        }

    def source(self, value: Value | None, through: tuple[str, ...] = _VIEWS) -> Layer | None:
        """The layer that made a value, behind layers of the kinds `through`; None for an input of the network."""
        layer = self._maker.get(value.name) if value else None
        while layer is not None and layer.kind in through:
            value = layer.inputs[0]
            layer = self._maker.get(value.name) if value else None
        return layer

    def constants(self, layer: Layer) -> Iterator[str]:
        """The names of the weights that a layer reads."""
        for value in layer.inputs:
            source = self.source(value)
            if source is not None and source.kind == "constant":
                yield source.name

    def _fp8_weight(self, product: Layer) -> Iterator[str]:
        """The weight of a product of which both operands are dequantized E4M3; nothing for any other product."""
        sources = [self.source(value) for value in product.inputs]
        if not all(_dequantizes(source) for source in sources):
            return
        quantized = [self.source(source.inputs[0]) for source in sources if source]
        kinds = {source.kind for source in quantized if source}
        if kinds == {"quantize", "constant"}:
            yield from (source.name for source in quantized if source and source.kind == "constant")


def _dequantizes(layer: Layer | None) -> bool:
    return layer is not None and layer.kind == "dequantize" and _dtype(layer.inputs[0]) == FP8


def _dtype(value: Value | None) -> str:
    return value.dtype if value else ""


def _bindings(network: Layers, contract: Contract, cache_dtype: str) -> Iterator[str]:
    caches = {cache.name for cache in contract.caches()}

    def expected(binding: Binding) -> tuple[str, str]:
        is_cache = (binding.in_place_of or binding.name) in caches
        return binding.name, cache_dtype if is_cache else binding.dtype

    for what, values, bindings in (
        ("inputs", network.inputs, contract.inputs()),
        ("outputs", network.outputs, contract.outputs_of_step()),
    ):
        seen = {(value.name, value.dtype) for value in values}
        wanted = {expected(binding) for binding in bindings}
        if seen != wanted:
            name, dtype = min(seen ^ wanted)
            yield f"its {what} are not those of the contract, as to {name} in {dtype}"


def _caches(network: Layers, contract: Contract, cache_dtype: str) -> Iterator[str]:
    written = {
        (layer.inputs[0].name, layer.outputs[0].name)
        for layer in network.layers
        if layer.inputs
        and layer.inputs[0]
        and (layer.plugin == "FP8CacheWrite" if cache_dtype == FP8 else layer.kind == "kv_cache_update")
    }
    how = "FP8CacheWrite" if cache_dtype == FP8 else "KV_CACHE_UPDATE"
    for binding in contract.outputs_of_step():
        if binding.in_place_of and (binding.in_place_of, binding.name) not in written:
            yield f"no {how} writes {binding.in_place_of} into {binding.name}"


def _attentions(graph: _Graph, contract: Contract) -> Iterator[str]:
    """Every layer attends over its own caches, each query to what lies before it in its row."""
    found = set()
    for layer in graph.attentions:
        if layer.causal == "lower_right" and layer.kv_lengths:
            keys, values = (graph.source(value, (*_VIEWS, "dequantize")) for value in layer.inputs[1:3])
            if keys and values:
                found.add((keys.outputs[0].name, values.outputs[0].name))
    for i in range(contract.num_hidden_layers):
        if (f"k_cache_out.{i}", f"v_cache_out.{i}") not in found:
            yield f"layer {i} has no lower-right causal attention with lengths over its caches"


def _experts(graph: _Graph, contract: Contract, plugin: str | None) -> Iterator[str]:
    """Every MoE layer has its router and its experts."""
    has: dict[str, set[str]] = {}
    for layer in graph.layers:
        name = layer.plugin or ("IMoELayer" if layer.kind == "moe" else None)
        if name:
            has.setdefault(name, set()).update(graph.constants(layer))
    for i in range(contract.first_k_dense_replace, contract.num_hidden_layers):
        for name in ("MoERouter", plugin or "IMoELayer"):
            if not any(weight.startswith(f"model.layers.{i}.") for weight in has.get(name, ())):
                yield f"layer {i} has no {name}"
