"""A parsed network as plain data, layer by layer: for people to read and for checks to walk, with and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from glm_export.exporter.tensorrt.network import Network

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}
"""TensorRT's names of dtypes -> numpy's; the others keep theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """A tensor between layers."""

    name: str
    dtype: str
    """numpy's name."""
    shape: tuple[int, ...]
    """-1 where it is free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer. Absent optional inputs are None."""

    name: str
    kind: str
    """The LayerType in lower case, such as matrix_multiply or kv_cache_update."""
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    plugin: str | None = None
    """The op that a plugin layer runs."""
    causal: str | None = None
    """Of an attention: none, upper_left or lower_right."""
    kv_lengths: bool = False
    """Whether an attention is told how many keys each row has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """A network: what it is bound to, and its layers in the order of the graph."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    layers: tuple[Layer, ...]


def read_layers(network: Network) -> Layers:
    """Reads a whole network; layers that need no execution, such as shapes and constants, are among them."""
    definition = network.definition
    return Layers(
        inputs=tuple(_value(definition.get_input(i)) for i in range(definition.num_inputs)),
        outputs=tuple(_value(definition.get_output(i)) for i in range(definition.num_outputs)),
        layers=tuple(_layer(network.library.module, definition.get_layer(i)) for i in range(definition.num_layers)),
    )


def _layer(module: Any, layer: Any) -> Layer:
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    details: dict[str, Any] = {}
    # The bindings give every layer its base class; this is how they let a caller name the real one.
    if layer.type == module.LayerType.PLUGIN_V3:
        layer.__class__ = module.IPluginV3Layer
        details["plugin"] = _plugin_name(module, layer.plugin)
    elif layer.type == module.LayerType.ATTENTION_INPUT:
        layer.__class__ = module.IAttentionInputLayer
        attention = layer.attention
        details["causal"] = attention.causal_kind.name.lower()
        details["kv_lengths"] = attention.key_value_lengths is not None
    return Layer(
        name=layer.name,
        kind=layer.type.name.lower(),
        inputs=tuple(None if tensor is None else _value(tensor) for tensor in inputs),
        outputs=tuple(_value(layer.get_output(i)) for i in range(layer.num_outputs)),
        **details,
    )


def _value(tensor: Any) -> Value:
    dtype = tensor.dtype.name
    return Value(name=tensor.name, dtype=DTYPES.get(dtype, dtype.lower()), shape=tuple(tensor.shape))


def _plugin_name(module: Any, plugin: Any) -> str:
    core = plugin.get_capability_interface(module.PluginCapabilityType.CORE)
    name: str = core.plugin_name
    return name
