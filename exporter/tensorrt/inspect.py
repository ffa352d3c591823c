"""What `glm-export inspect --target` shows, as data: the network that an engine is built from, layer by layer.

That needs the library and no GPU. Where there is a GPU, the library's own description of the built engine comes along.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx

from glm_export.exporter.recipe import Engine, Recipe
from glm_export.exporter.tensorrt.builder import EngineChoices, lowered_model, lowered_network
from glm_export.exporter.tensorrt.check import fp8_products
from glm_export.exporter.tensorrt.layers import Layer, Value
from glm_export.runtime import cuda
from glm_export.runtime.bundle import MODEL_NAME, Bundle
from glm_export.runtime.engine_info import EngineInfo
from glm_export.runtime.errors import BackendError
from glm_export.runtime.files import HashingWriter
from glm_export.runtime.tensorrt_library import load_library
from glm_export.runtime.trt_engine import open_engine


def inspect_network(bundle: Bundle, target: str) -> dict[str, Any]:
    """Parses the network of a bundle for a target and describes it, as JSON values.

    The choices are those of the bundle's engine, or what its recipe says where it has none.

    Raises:
        BackendError: the library is missing, or does not take the graph as it must be.
        IntegrityError: the graph or the engine is not what the manifest says.
        UsageError: the graph can not be lowered.
    """
    choices = _choices(bundle, target)
    library = load_library(target)
    model = onnx.load(bundle.file(MODEL_NAME), load_external_data=False)
    _, network, counts = lowered_network(library, bundle, model, choices)
    fp8 = fp8_products(network)
    return {
        "path": str(bundle.directory),
        "target": target,
        "library_version": library.version,
        "batch": choices.batch,
        "capacity": choices.capacity,
        "prefill": choices.prefill,
        "inputs": [_tensor(value) for value in network.inputs],
        "outputs": [_tensor(value) for value in network.outputs],
        "counts": counts,
        "layers": [_layer(layer) | {"fp8_weight": fp8.get(layer.name)} for layer in network.layers],
        "engine": _engine(bundle, target),
    }


def save_graph(bundle: Bundle, target: str, path: Path) -> None:
    """Writes the graph that TensorRT's parser is given, for other tools.

    Raises:
        IntegrityError: model.onnx is not what the manifest says.
        UsageError: the graph can not be lowered.
    """
    model = onnx.load(bundle.file(MODEL_NAME), load_external_data=False)
    with HashingWriter(path) as writer:
        writer.write(lowered_model(bundle, model, _choices(bundle, target)).SerializeToString(deterministic=True))


def _choices(bundle: Bundle, target: str) -> EngineChoices:
    if target in bundle.manifest.engines:
        info = EngineInfo.read(bundle, target)
        fp8 = info.cache_dtype != info.compute_dtype
        engine = Engine(
            prefill=info.prefill,
            cache_dtype="fp8" if fp8 else "compute",
            experts="trt_moe" if "moe" in info.layers else "plugin",
        )
        return EngineChoices(target=target, batch=info.batch, capacity=info.capacity, engine=engine)
    manifest = bundle.manifest
    engine = Recipe.from_dict(manifest.recipe).engine
    return EngineChoices(target=target, batch=manifest.batch, capacity=manifest.capacity, engine=engine)


def _layer(layer: Layer) -> dict[str, Any]:
    table = dataclasses.asdict(layer)
    table["inputs"] = [None if value is None else _tensor(value) for value in layer.inputs]
    table["outputs"] = [_tensor(value) for value in layer.outputs]
    return table


def _tensor(value: Value) -> dict[str, Any]:
    return dataclasses.asdict(value) | {"shape": list(value.shape)}


def _engine(bundle: Bundle, target: str) -> Any:
    """The library's own description of the built engine; None without one, or without a GPU that can hold it."""
    if target not in bundle.manifest.engines:
        return None
    try:
        cuda.gpu()
    except BackendError:
        return None
    engine = open_engine(bundle, EngineInfo.read(bundle, target))
    text = engine.plan.create_engine_inspector().get_engine_information(
        engine.library.module.LayerInformationFormat.JSON
    )
    return json.loads(text)
