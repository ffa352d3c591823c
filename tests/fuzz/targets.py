"""Everything that reads bytes which may be anyone's, and what must hold whatever they are.

They are taken, and then mean what an independent reader says they mean; or they are refused with one error of the kind
that is documented, in one sentence that names the file. A target returns whether the bytes were taken and raises
AssertionError, or whatever escaped, if neither holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from mutation import PATTERN, mutated_json, mutated_manifest, mutated_shard

from glm_export.exporter.config import ALIASES, ROPE_TABLES, Glm4MoeConfig, parse_json
from glm_export.exporter.source.quantization_config import parse_quantization
from glm_export.exporter.source.safetensors_header import header_length, parse_header
from glm_export.exporter.source.shards import INDEX, parse_index
from glm_export.runtime.contract import OPTIONAL_OUTPUTS, Contract
from glm_export.runtime.errors import GlmExportError, InputError, IntegrityError
from glm_export.runtime.manifest import MANIFEST_NAME, FileRecord, Manifest

SHARD = "model-00001-of-00002.safetensors"
CONFIG = "config.json"
LONGEST_SENTENCE = 3000

MODULES = (
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.gate_proj",
    "model.layers.1.mlp.gate",
)

CONFIG_TABLE: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "use_qk_norm": True,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "routed_scaling_factor": 1.0,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [7, 9],
    "pad_token_id": 7,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, kw_only=True)
class Target:
    seeds: Callable[[], list[bytes]]
    mutated: Callable[[bytes, random.Random], bytes]
    read: Callable[[bytes], bool]


@contextlib.contextmanager
def refused_well(source: str, *kinds: type[GlmExportError]) -> Iterator[None]:
    """Checks the error that leaves the block, and raises it on."""
    try:
        yield
    except kinds as error:
        sentence = str(error)
        if source not in sentence or not sentence.endswith(".") or len(sentence) > LONGEST_SENTENCE:
            raise AssertionError(ascii(sentence)) from error
        raise


def read_header(data: bytes) -> bool:
    """As a shard is read; the safetensors library must see the same tensors with the same bytes."""
    try:
        with refused_well(SHARD, InputError):
            end = 8 + header_length(data[:8], len(data), SHARD)
            found = parse_header(data[:end], len(data), SHARD)
    except InputError:
        return False
    theirs = {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(data)
    }
    ours = {name: (each.dtype, each.shape, data[each.start : each.end]) for name, each in found.items()}
    assert ours == theirs
    return True


def read_index(data: bytes) -> bool:
    try:
        with refused_well(INDEX, InputError):
            index = parse_index(data, INDEX)
    except InputError:
        return False
    table = json.loads(data)
    assert index.weight_map == table["weight_map"]
    assert all(Path(file).name == file and file.endswith(".safetensors") for file in index.weight_map.values())
    assert index.total_size == (table.get("metadata") or {}).get("total_size")
    return True


def read_config(data: bytes) -> bool:
    try:
        with refused_well(CONFIG, InputError):
            config = Glm4MoeConfig.from_dict(parse_json(data, CONFIG), CONFIG)
    except InputError:
        return False
    table = json.loads(data)
    said = {
        ALIASES.get(key, key): value for key, value in table.items() if value is not None and key not in ROPE_TABLES
    }
    for key in ROPE_TABLES:
        said |= {name: value for name, value in (table.get(key) or {}).items() if value is not None}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "eos_token_id" and isinstance(said.get("eos_token_id"), int):
            value = value[0]
        expected = said.get(field.name, field.default)
        expected = tuple(expected) if isinstance(expected, list) else expected
        assert (float(expected) if isinstance(value, float) else expected) == value
    assert Glm4MoeConfig.from_dict(config.to_hf_dict()) == config
    return True


def read_quantization(data: bytes) -> bool:
    """Two tables in one text: `config` as config.json has it, and perhaps `hf_quant` of ModelOpt's file."""
    try:
        with refused_well(CONFIG, InputError):
            tables = parse_json(data, CONFIG)
    except InputError:
        return False
    config, hf_quant = tables.get("config"), tables.get("hf_quant")
    if not isinstance(config, dict) or not isinstance(hf_quant, dict | None):
        return False  # refused before anybody asks for quantization
    try:
        with refused_well(CONFIG, InputError):
            found = parse_quantization(config, hf_quant, CONFIG)
    except InputError:
        return False
    assert (found is None) == (config.get("quantization_config") is None and hf_quant is None)
    if found is not None:
        method = (config.get("quantization_config") or {"quant_method": "modelopt"})["quant_method"]
        assert found.method == method
        for module in MODULES:
            scheme = found.scheme(module)
            assert scheme is None or all(extent is None or extent > 0 for extent in (scheme.rows, scheme.columns))
    return True


def read_manifest(data: bytes) -> bool:
    """As a bundle's manifest is read; what is taken must be written back as the same values."""
    directory = Path(_bundle().name)
    (directory / MANIFEST_NAME).write_bytes(data)
    try:
        with refused_well(str(directory), InputError, IntegrityError):
            manifest = Manifest.read(directory)
    except GlmExportError:
        return False
    assert manifest.to_json() == json.loads(data)
    return True


@functools.cache
def _bundle() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="glm-export-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def shards() -> list[bytes]:
    def file(header: dict[str, Any]) -> bytes:
        text = json.dumps(header).encode()
        size = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        return len(text).to_bytes(8, "little") + text + PATTERN[:size]

    def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    bf16 = {"model.norm.weight": tensor("BF16", [8], 0, 16), "lm_head.weight": tensor("BF16", [4, 8], 16, 80)}
    fp8 = {
        "__metadata__": {"format": "pt"},
        "model.layers.0.mlp.up_proj.weight": tensor("F8_E4M3", [4, 8], 4, 36),
        "model.layers.0.mlp.up_proj.weight_scale": tensor("F32", [1], 0, 4),
        "model.layers.0.mlp.up_proj.input_scale": tensor("F32", [], 36, 40),
    }
    return [file(bf16), file(fp8), file({"a": tensor("U8", [1], 0, 1)})]


def indices() -> list[bytes]:
    weight_map = {"model.norm.weight": SHARD, "lm_head.weight": "model-00002-of-00002.safetensors"}
    tables = [{"metadata": {"total_size": 80}, "weight_map": weight_map}, {"weight_map": weight_map}]
    return [json.dumps(table).encode() for table in tables]


def configs() -> list[bytes]:
    new = {key: value for key, value in CONFIG_TABLE.items() if key not in ("rope_theta", "partial_rotary_factor")}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    tables = [CONFIG_TABLE, {**new, "rope_parameters": rope}, {**CONFIG_TABLE, "rope_scaling": None, "eos_token_id": 7}]
    return [json.dumps(table).encode() for table in tables]


def quantizations() -> list[bytes]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    activations = {**weights, "dynamic": True, "strategy": "token"}
    channel = {"targets": ["Linear"], "weights": {**weights, "strategy": "channel"}, "input_activations": activations}
    block = {"targets": ["re:.*_proj$"], "weights": {**weights, "strategy": "block", "block_structure": [128, 128]}}
    compressed = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head", "re:.*gate$"],
    }
    modelopt = {"quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"]}
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    tables: list[tuple[dict[str, Any] | None, dict[str, Any] | None]] = [
        ({**compressed, "config_groups": {"group_0": channel}}, None),
        ({**compressed, "config_groups": {"group_0": block, "FP8_DYNAMIC": ["Linear"]}}, None),
        ({**fp8, "modules_to_not_convert": ["lm_head", "mlp.gate"]}, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, None),
        (None, {"producer": {"name": "modelopt"}, "quantization": modelopt}),
    ]
    return [json.dumps({"config": {"quantization_config": a}, "hf_quant": b}).encode() for a, b in tables]


def manifests() -> list[bytes]:
    contract = Contract(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size=16,
        vocab_size=61,
        n_routed_experts=4,
        first_k_dense_replace=1,
        compute_dtype="bfloat16",
    )
    record = FileRecord(size=3, sha256="a" * 64)
    plain = Manifest(
        name="tiny",
        precision="fp8",
        contract=contract,
        recipe={"name": "tiny"},
        source={"path": "/checkpoint", "shards": []},
        versions={"onnx": "1.22.0"},
        weights=True,
        eos_token_ids=(7,),
        max_position_embeddings=128,
        capacity=64,
        batch=1,
        files={"model.onnx": record, "weights/head.safetensors": record, "engines/trt/plan": record},
        engines={"trt": ("engines/trt/plan",)},
    )
    rich = dataclasses.replace(
        plain,
        precision="bf16",
        contract=dataclasses.replace(contract, logits="all", outputs=OPTIONAL_OUTPUTS),
        engines={},
    )
    return [json.dumps(manifest.to_json()).encode() for manifest in (plain, rich)]


CHECKPOINT: dict[str, Target] = {
    "header": Target(seeds=shards, mutated=mutated_shard, read=read_header),
    "index": Target(seeds=indices, mutated=mutated_json, read=read_index),
    "config": Target(seeds=configs, mutated=mutated_json, read=read_config),
    "quantization": Target(seeds=quantizations, mutated=mutated_json, read=read_quantization),
}
BUNDLE: dict[str, Target] = {"manifest": Target(seeds=manifests, mutated=mutated_manifest, read=read_manifest)}
