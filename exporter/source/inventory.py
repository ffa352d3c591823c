"""Which tensors a checkpoint must have, which it may have, and what is said about those that are otherwise.

The stored dtype decides what a linear is: E4M3 needs a scheme in quantization_config and its scales beside it, anything
else is not quantized, whatever an ignore list says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import TIED, Parameter, mtp_parameters, parameters, parts
from glm_export.exporter.source.quantized import Quantization, Scheme
from glm_export.exporter.source.safetensors_header import StoredTensor

PLAIN_DTYPES = ("BF16", "F16", "F32")
FP8 = "F8_E4M3"

SCALES = ("_scale", "_scale_inv")
"""Endings after the name of an FP8 weight; both kinds are multiplied with, for all the name says."""

_UNUSED = re.compile(r".*\.(input_scale|[qkv]_scale|[kv]_proj\.(output_scale|[kv]_scale))")
"""Scales for activations and the KV cache, which are quantized dynamically or not at all here."""

_MAY_BE_FP8 = ("linear", "experts", "lm_head")

Tensors = Mapping[str, StoredTensor]


def scale_of(name: str, tensors: Tensors) -> str | None:
    """The name of the tensor with the scales of an FP8 weight, if there is exactly one."""
    found = [name + ending for ending in SCALES if name + ending in tensors]
    return found[0] if len(found) == 1 else None


def stored_parts(parameter: Parameter, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """The tensors (name and shape) that a parameter is stored in: one by itself, or the experts one by one."""
    return {parameter.name: parameter.shape} if parameter.name in tensors else parts(parameter)


def is_unused(name: str, quantization: Quantization | None) -> bool:
    """Whether a tensor belongs to the quantization of a checkpoint but not to its weights."""
    return quantization is not None and _UNUSED.fullmatch(name) is not None


def problems(config: Glm4MoeConfig, quantization: Quantization | None, tensors: Tensors) -> Iterator[str]:
    """Every tensor of the model that is missing, unexpected, or not of the shape or dtype it should be."""
    left = {name: tensor for name, tensor in tensors.items() if not is_unused(name, quantization)}
    if config.tie_word_embeddings:
        for name in TIED:  # as in transformers, a copy that some writers store all the same does not count
            for ending in ("", *SCALES):
                left.pop(name + ending, None)
    for parameter in parameters(config).values():
        yield from _parameter_problems(parameter, quantization, tensors, left)
    yield from (f"{name} is unexpected" for name in left)


def mtp_problems(config: Glm4MoeConfig, quantization: Quantization | None, tensors: Tensors) -> Iterator[str]:
    """Tensors of the multi-token-prediction layers of another shape than theirs, or with names that none of them has.

    They are not needed, so any may be missing, and their dtypes do not matter.
    """
    left = {name: tensor for name, tensor in tensors.items() if not is_unused(name, quantization)}
    for parameter in mtp_parameters(config, duplicates=True).values():
        for name, shape in stored_parts(parameter, tensors).items():
            if (tensor := left.pop(name, None)) is not None and tensor.shape != shape:
                yield _wrong_shape(name, tensor, shape)
            for ending in SCALES:  # also without the weight, as some vendors ship them
                left.pop(name + ending, None)
    yield from (f"{name} is unexpected" for name in left)


def complete_mtp(config: Glm4MoeConfig, quantization: Quantization | None, tensors: Tensors) -> tuple[Parameter, ...]:
    """The parameters of the multi-token-prediction layers that are all there and can be read."""
    return tuple(
        parameter
        for parameter in mtp_parameters(config, duplicates=True).values()
        if not any(_parameter_problems(parameter, quantization, tensors, dict(tensors)))
    )


def _parameter_problems(
    parameter: Parameter,
    quantization: Quantization | None,
    tensors: Tensors,
    left: MutableMapping[str, StoredTensor],
) -> Iterator[str]:
    """Takes what belongs to a parameter from `left`, and yields what is wrong with it."""
    first: tuple[str, Scheme | None] | None = None
    for name, shape in stored_parts(parameter, tensors).items():
        tensor = left.pop(name, None)
        if tensor is None:
            yield f"{name} is missing"
            continue
        if tensor.shape != shape:
            yield _wrong_shape(name, tensor, shape)
            continue
        scheme = None
        if tensor.dtype == FP8 and parameter.kind in _MAY_BE_FP8:
            scheme = quantization.scheme(name.removesuffix(".weight")) if quantization else None
            if scheme is None:
                yield f"{name} is {FP8}, but config.json does not say how it is quantized"
                continue
            scale_name = scale_of(name, tensors)
            scale = left.pop(scale_name, None) if scale_name else None
            if scale is None:
                yield f"{name} is {FP8} without exactly one of {' and '.join(name + ending for ending in SCALES)}"
                continue
            yield from _scale_problems(f"{scale_name}", scale, scheme, (shape[0], shape[-1]))
        elif tensor.dtype not in PLAIN_DTYPES:
            yield f"{name} is {tensor.dtype}, expected one of {', '.join(PLAIN_DTYPES)}"
        first = first or (tensor.dtype, scheme)
        if (tensor.dtype, scheme) != first:
            how = " ".join(str(word) for word in first if word)
            yield f"{name} is {tensor.dtype}, but other experts of its layer are {how}"


def _scale_problems(name: str, scale: StoredTensor, scheme: Scheme, shape: tuple[int, int]) -> Iterator[str]:
    if not scheme.fits(scale.shape, shape):
        yield f"{name} has shape {list(scale.shape)}, expected {list(scheme.grid(shape))} for FP8 {scheme}"
    if scale.dtype not in PLAIN_DTYPES:
        yield f"{name} is {scale.dtype}, expected one of {', '.join(PLAIN_DTYPES)}"


def _wrong_shape(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> str:
    return f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
