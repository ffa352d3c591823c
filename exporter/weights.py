"""Gives the reference model its weights: from a bundle as they were stored, or from a checkpoint as they came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import TIED, parameters
from glm_export.exporter.model import Glm4MoeForCausalLM
from glm_export.exporter.precision import HIGH_PRECISION
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.storage import stored_tensors
from glm_export.exporter.weight_file import FOLDER
from glm_export.runtime.bundle import Bundle

Read = Callable[[str], Tensor]
"""Returns a tensor of the model's state dict by name."""


def reference_of_bundle(bundle: Bundle, *, stream: bool = False, permute_seed: int | None = None) -> Glm4MoeForCausalLM:
    """The precision-aware reference: exactly the numbers that the bundle's engines compute with.

    Args:
        bundle: an opened bundle.
        stream: read each layer's weights when it runs and forget them afterwards.
        permute_seed: put the hidden channels into a random order. That is the same model in exact arithmetic, FP8 row
            scales included; what changes is the order in which float32 sums are taken.
    """
    config = bundle_config(bundle)
    read = read_bundle(bundle, config)
    if permute_seed is not None:
        read = _permuted(read, config, permute_seed)
    return _reference(config, bundle.manifest.precision, read, stream=stream)


def reference_of_checkpoint(checkpoint: Checkpoint, *, stream: bool = False) -> Glm4MoeForCausalLM:
    """The float32 reference: the checkpoint's weights in their own dtype (exact in float32), float32 activations."""
    return _reference(checkpoint.config, "fp32", read_checkpoint(checkpoint), stream=stream)


def bundle_config(bundle: Bundle) -> Glm4MoeConfig:
    """The config of the model in a bundle."""
    return Glm4MoeConfig.from_file(bundle.file("config.json"))


def read_bundle(bundle: Bundle, config: Glm4MoeConfig) -> Read:
    """Reads stored tensors through memory maps."""
    precision = bundle.manifest.precision
    group_of = {t.name: p.group for p in parameters(config).values() for t in stored_tensors(p, precision)}

    def read(name: str) -> Tensor:
        if config.tie_word_embeddings:
            name = TIED.get(name, name)
        # Sizes were checked when the bundle was opened; `verify` and check="full" compare the hashes.
        path = bundle.file(f"{FOLDER}/{group_of[name]}.safetensors", hashed=False)
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor

    return read


def read_checkpoint(checkpoint: Checkpoint) -> Read:
    """Reads parameters in their source dtype; the kinds that are always float32 are converted."""
    found = parameters(checkpoint.config)

    def read(name: str) -> Tensor:
        if checkpoint.config.tie_word_embeddings:
            name = TIED.get(name, name)
        tensor = checkpoint.read(found[name])
        return tensor.float() if found[name].kind in HIGH_PRECISION else tensor

    return read


def _permuted(read: Read, config: Glm4MoeConfig, seed: int) -> Read:
    """Reads tensors with their hidden axis, wherever it is, in a random order."""
    order = torch.randperm(config.hidden_size, generator=torch.Generator().manual_seed(seed))

    def permuted(name: str) -> Tensor:
        tensor = read(name)
        axis = _hidden_axis(name)
        if axis is None:
            return tensor
        # Selecting by index is not implemented for FP8.
        raw = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        return raw.index_select(axis, order).view(tensor.dtype)

    return permuted


def _hidden_axis(name: str) -> int | None:
    """Which axis of a tensor runs over the hidden channels of the residual stream."""
    writes = ("o_proj.", "down_proj")  # [.., D, in], and scales [.., D]
    if any(part in name for part in writes):
        return -1 if name.endswith("_scale") else -2
    if name.endswith(("_scale", "bias", "q_norm.weight", "k_norm.weight")):
        return None
    return -1


def _reference(config: Glm4MoeConfig, precision: str, read: Read, *, stream: bool) -> Glm4MoeForCausalLM:
    with torch.device("meta"):
        model = Glm4MoeForCausalLM(config, precision).eval()
    units = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm, "lm_head": model.lm_head}
    units |= {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    for prefix, unit in units.items():
        if stream:
            unit.register_forward_pre_hook(lambda unit, _, prefix=prefix: _load(unit, prefix, read))
            unit.register_forward_hook(_unload)
        else:
            _load(unit, prefix, read)
    return model


def _load(unit: nn.Module, prefix: str, read: Read) -> None:
    unit.load_state_dict({name: read(f"{prefix}.{name}") for name in unit.state_dict()}, assign=True)


def _unload(unit: nn.Module, _inputs: Any, _output: Any) -> None:
    """Forgets a unit's weights after its forward, so that the whole model never has to fit into memory."""
    unit.to_empty(device="meta")
