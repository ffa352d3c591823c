"""FP8 checkpoints in the vendors' layouts, made from an unquantized one without any code of this project.

compressed-tensors quantizes for its own layouts; the two others are spelled out in numpy.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Encode = Callable[[str, torch.Tensor], Tensors]

LINEAR = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(.*\.)?(gate|up|down)_proj|shared_head\.head)\.weight"
)
"""What GLM's own FP8 checkpoints quantize."""

IGNORED = ["lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp.gate", "model.layers.4.eh_proj"]

DYNAMIC = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}


def write(source: Path, out: Path, encode: Encode, quantization_config: Mapping[str, Any] | None) -> Path:
    """Writes the checkpoint in `source` into one shard, with what `encode` makes of each linear weight."""
    out.mkdir()
    for file in source.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, out)
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            tensors |= encode(name, tensor) if LINEAR.fullmatch(name) else {name: tensor}
    save_file(tensors, out / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (out / "config.json").write_text(json.dumps(config))
    return out


def compressed_tensors(
    source: Path, out: Path, *, block: tuple[int, int] | None = None, key: str = "group_0", **weights: Any
) -> Path:
    """As compressed-tensors compresses it; `scale_dtype` of the scales, the rest goes into its QuantizationArgs."""
    scale_dtype = weights.pop("scale_dtype", torch.float32)
    strategy = weights.get("strategy", "channel")
    table = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    if block:
        table["block_structure"] = list(block)
    args = QuantizationArgs(**table)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=QuantizationArgs(**DYNAMIC))
    compressor = BaseCompressor.get_value_from_registry("float-quantized")

    def encode(name: str, tensor: torch.Tensor) -> Tensors:
        scale, _ = calculate_qparams(*extremes(tensor.float(), strategy, block), args)
        state = {"weight": tensor.float(), "weight_scale": scale.to(scale_dtype)}
        module = name.removesuffix(".weight")
        return {f"{module}.{part}": value for part, value in compressor.compress(state, scheme).items()}

    group = {"targets": ["Linear"], "weights": table, "input_activations": DYNAMIC, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {key: group},
        "ignore": IGNORED,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return write(source, out, encode, config)


def extremes(weight: torch.Tensor, strategy: str, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimum and maximum of the elements that share a scale, in the shape of the scales."""
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if block is None:
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    blocks = [list(rows.split(block[1], 1)) for rows in weight.split(block[0], 0)]
    return tuple(torch.stack([torch.stack([f(b) for b in row]) for row in blocks]) for f in (torch.min, torch.max))  # type: ignore[return-value]


def quantize(weight: torch.Tensor, block: tuple[int, int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """E4M3 values and the float32 scales of their blocks, in numpy."""
    values = weight.float().numpy()
    grid = tuple(math.ceil(n / b) for n, b in zip(values.shape, block, strict=True))
    scale, quantized = np.empty(grid, np.float32), np.empty(values.shape, ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(*grid):
        place = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        scale[i, j] = np.abs(values[place]).max() / 448
        quantized[place] = (values[place] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return quantized, scale


def dequantize(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The float32 numbers, in numpy."""
    quantized = values.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for i, j in np.ndindex(*scale.shape):
        quantized[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scale[i, j].item()
    return torch.from_numpy(quantized)


def as_torch(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)


def fp8_block(source: Path, out: Path, block: tuple[int, int] = (128, 128)) -> Path:
    """`quant_method: fp8`, as DeepSeek introduced it."""

    def encode(name: str, tensor: torch.Tensor) -> Tensors:
        values, scale = quantize(tensor, block)
        return {name: as_torch(values), f"{name}_scale_inv": torch.from_numpy(scale)}

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head", "model.embed_tokens", "mlp.gate", "eh_proj"],
    }
    return write(source, out, encode, config)


def modelopt(source: Path, out: Path, *, in_config: bool = False) -> Path:
    """ModelOpt's per-tensor FP8, static activations, an FP8 cache; in hf_quant_config.json, or in config.json too."""

    def encode(name: str, tensor: torch.Tensor) -> Tensors:
        values, scale = quantize(tensor, tuple(tensor.shape))  # type: ignore[arg-type]
        module = name.removesuffix(".weight")
        found = {name: as_torch(values), f"{module}.weight_scale": torch.tensor(scale.item())}
        found[f"{module}.input_scale"] = torch.tensor(0.02)
        if module.endswith(("k_proj", "v_proj")):
            found[f"{module}.{module[-6]}_scale"] = torch.tensor(1.0)
        return found

    excluded = ["lm_head", "model.embed_tokens", "model.layers.*.mlp.gate", "*.eh_proj"]
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": excluded}
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": excluded, "producer": {"name": "modelopt"}}
    write(source, out, encode, config if in_config else None)
    table = {"producer": {"name": "modelopt", "version": "0.40"}, "quantization": inner}
    (out / "hf_quant_config.json").write_text(json.dumps(table))
    return out
