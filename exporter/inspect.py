"""What `glm-export inspect` shows, as data: everything a bundle says about itself, without reading a weight."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import onnx

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import parameters
from glm_export.runtime.bundle import MODEL_NAME, Bundle
from glm_export.runtime.engine_info import EngineInfo
from glm_export.runtime.session import numpy_dtype

KINDS = (
    *("embedding", "lm_head", "attention linears", "dense MLP", "shared experts", "routed experts", "router", "norms"),
    *("biases", "scales"),
)
"""The kinds of weights, as they are added up."""


def inspect_bundle(bundle: Bundle) -> dict[str, Any]:
    """Everything worth knowing about a bundle, as JSON values.

    Raises:
        InputError: its config.json is of no known model.
        IntegrityError: config.json, model.onnx or an engine.json is not what the manifest says.
    """
    manifest = bundle.manifest
    config = Glm4MoeConfig.from_file(bundle.file("config.json"))
    model = onnx.load(bundle.file(MODEL_NAME), load_external_data=False)
    return {
        "path": str(bundle.directory),
        "name": manifest.name,
        "precision": manifest.precision,
        "parameters": _parameters(config),
        "has_weights": manifest.weights,
        "weight_bytes": _weight_bytes(model.graph),
        "kv_bytes_per_token": _kv_bytes_per_token(bundle),
        "capacity": manifest.capacity,
        "batch": manifest.batch,
        "eos_token_ids": list(manifest.eos_token_ids),
        "bindings": manifest.to_json()["bindings"],
        "opset": {entry.domain or "onnx": entry.version for entry in model.opset_import},
        "nodes": _node_counts(model.graph),
        "engines": {target: EngineInfo.read(bundle, target).to_json() for target in manifest.engines},
        "total_bytes": bundle.total_bytes,
        "files": {path: dataclasses.asdict(record) for path, record in manifest.files.items()},
        "source": dict(manifest.source),
        "versions": dict(manifest.versions),
        "recipe": dict(manifest.recipe),
        "config": config.to_hf_dict(),
    }


def kind_of_weight(name: str) -> str:
    """Which of KINDS a weight of the graph is of, by its name."""
    places = {
        "embed_tokens": "embedding",
        "lm_head": "lm_head",
        "self_attn": "attention linears",
        "gate": "router",
        "experts": "routed experts",
        "shared_experts": "shared experts",
        "mlp": "dense MLP",
    }
    path = name.split(".")
    if name.endswith("_scale"):
        return "scales"
    if path[-1] == "bias":
        return "biases"
    if path[-2].endswith("norm"):
        return "norms"
    # From the end: shared_experts lie in the mlp too.
    return next(places[part] for part in reversed(path) if part in places)


def _parameters(config: Glm4MoeConfig) -> dict[str, int]:
    """How many numbers the model has, and how many of them take part in one token."""
    every = parameters(config).values()
    routed = sum(parameter.numel for parameter in every if parameter.kind == "experts")
    total = sum(parameter.numel for parameter in every)
    idle = routed * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return {"total": total, "active": total - idle}


def _weight_bytes(graph: Any) -> dict[str, int]:
    """Bytes per kind, of what the graph refers to in weight files; also of a graph whose weights were not written."""
    sizes = dict.fromkeys(KINDS, 0)
    seen = set()
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and (key := (place["location"], place["offset"])) not in seen:  # a tied lm_head is the embedding
            seen.add(key)
            sizes[kind_of_weight(tensor.name)] += int(place["length"])
    return sizes


def _kv_bytes_per_token(bundle: Bundle) -> int:
    """What one token of one row takes in all caches: their shapes without B and C."""
    return sum(
        math.prod(dim for dim in cache.shape if isinstance(dim, int)) * numpy_dtype(cache.dtype).itemsize
        for cache in bundle.manifest.contract.caches()
    )


def _node_counts(graph: Any) -> dict[str, int]:
    """How many nodes of each op, the most frequent first; ours with their domain."""
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
