"""Writes a bfloat16 checkpoint as GGUF for llama.cpp and ik_llama.cpp: bf16 bit for bit, or Q8_0 by gguf's quantizer.

    python bench/peers/write_gguf.py CHECKPOINT OUT.gguf --weights bf16|q8_0       needs: gguf, numpy

Router, norms and biases stay float32, as in every GGUF of these models. The vocabulary has names only: the measurements
feed token ids.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def stored(directory: Path) -> dict[str, Array]:
    """Every tensor, mapped: bfloat16 as its bits in uint16, or float32."""
    tensors: dict[str, Array] = {}
    for path in sorted(directory.glob("*.safetensors")):
        size = int.from_bytes(path.open("rb").read(8), "little")
        data = np.memmap(path, np.uint8, "r")
        for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
            if name == "__metadata__":
                continue
            dtype = {"BF16": np.uint16, "F32": np.float32}[entry["dtype"]]
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = data[start:end].view(dtype).reshape(entry["shape"])
    return tensors


def stacked(tensors: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """The tensors; `experts.3.up_proj.weight` becomes row 3 of `experts.up_proj.weight`."""
    experts: dict[str, dict[int, Array]] = {}
    for name, tensor in tensors.items():
        prefix, found, rest = name.partition(".mlp.experts.")
        if found:
            expert, _, what = rest.partition(".")
            experts.setdefault(f"{prefix}{found}{what}", {})[int(expert)] = tensor
        else:
            yield name, tensor
    for name, rows in experts.items():
        yield name, np.stack([rows[expert] for expert in range(len(rows))])


def encoded(name: str, tensor: Array, weights: str) -> tuple[Array, gguf.GGMLQuantizationType]:
    """The tensor as GGUF stores it, and its type there."""
    full = tensor if tensor.dtype == np.float32 else (tensor.astype(np.uint32) << 16).view(np.float32)
    if tensor.ndim == 1 or name.endswith(".mlp.gate.weight"):
        return full, gguf.GGMLQuantizationType.F32
    if weights == "bf16":
        return tensor.view(np.uint8), gguf.GGMLQuantizationType.BF16
    return gguf.quants.quantize(full, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], weights: str) -> None:
    """The architecture, in GGUF's keys."""
    rope = config["rope_parameters"]
    writer.add_name("random weights")
    writer.add_file_type(_FILE_TYPES[weights])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    size = config["vocab_size"]
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("glm4")
    writer.add_token_list(["<bos>", "<eos>", *(f"token{i}" for i in range(2, size))])
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (size - 2))
    writer.add_token_merges(["t o"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", choices=tuple(_FILE_TYPES), default="bf16")
    options = parser.parse_args()

    config = json.loads((options.checkpoint / "config.json").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(options.out, "glm4moe")
    describe(writer, config, options.weights)
    for name, tensor in stacked(stored(options.checkpoint)):
        ours = name.replace("e_score_correction_bias", "e_score_correction.bias")
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise SystemExit(f"GGUF has no name for {name}: expected the tensors of a Glm4MoeForCausalLM checkpoint.")
        data, kind = encoded(name, tensor, options.weights)
        writer.add_tensor(theirs, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{options.out}: {options.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
