"""An op's schema read as a plugin's signature: which dtypes, shapes and fields fit it, and what sizes they mean.

Errors are ValueErrors with a sentence: they reach the user through TensorRT's logger.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glm_export.plugins.schema import Attribute, OpSchema

Numbers = dict[str, int | float]
KERNELS_FIELD = "kernels"
"""The field that tells which CUDA kernels a plan was built for: their GLM_CUDA_ABI, 0 for none. Only plans have it."""

_KINDS = {int: np.dtype(np.int32), float: np.dtype(np.float32)}


def dims(shape: str) -> tuple[tuple[int, str], ...]:
    """The dimensions that a schema's shape names, as factor and letter: E,2F,D is (1, E), (2, F), (1, D)."""
    return tuple((int(factor or 1), letter) for factor, letter in re.findall(r"(\d*)([A-Z])", shape))


def variable_dtype(op: OpSchema, dtypes: Sequence[str]) -> str | None:
    """The dtype that all tensors of several allowed dtypes have; None if there are no such.

    Args:
        op: the schema.
        dtypes: numpy's names, of the inputs.
    """
    chosen: str | None = None
    for tensor, dtype in zip(op.inputs, dtypes, strict=True):
        if dtype not in tensor.dtypes:
            raise ValueError(f"{op.name}: {tensor.name} is {dtype}, expected {' or '.join(tensor.dtypes)}.")
        if len(tensor.dtypes) == 1:
            continue
        chosen = chosen or dtype
        if dtype != chosen:
            raise ValueError(f"{op.name}: {tensor.name} is {dtype}, expected {chosen} as the inputs before it.")
    return chosen


def sizes(op: OpSchema, shapes: Sequence[Sequence[int]], attributes: Mapping[str, int | float]) -> dict[str, int]:
    """The size of every letter.

    Args:
        op: the schema.
        shapes: of the inputs, or of the inputs and outputs; a negative dimension is not known yet and left out.
        attributes: some of them are sizes too.
    """
    found = {a.letter: int(attributes[a.name]) for a in op.attributes if a.letter is not None}
    for tensor, shape in zip((*op.inputs, *op.outputs), shapes, strict=False):
        expected = dims(tensor.shape)
        if len(shape) != len(expected):
            raise ValueError(f"{op.name}: {tensor.name} has shape {list(shape)}, expected [{tensor.shape}].")
        for (factor, letter), size in zip(expected, shape, strict=True):
            if size < 0:
                continue
            if size % factor or found.setdefault(letter, size // factor) != size // factor:
                known = f" with {letter} = {found[letter]}" if letter in found else ""
                raise ValueError(f"{op.name}: {tensor.name} has shape {list(shape)}, expected [{tensor.shape}]{known}.")
    return found


def read_fields(op: OpSchema, fields: Iterable[Any]) -> tuple[Numbers, int | None]:
    """The attributes in a PluginFieldCollection, and the kernels' version where there is one.

    A plan may come from anywhere: nothing is used before its type, length and range are known to be right.
    """
    given: dict[str, Any] = {field.name: field.data for field in fields}
    attributes = {attribute.name: _read(op, attribute, given.get(attribute.name)) for attribute in op.attributes}
    if KERNELS_FIELD not in given:
        return attributes, None
    version = Attribute(name=KERNELS_FIELD, type=int, meaning="")
    return attributes, int(_read(op, version, given[KERNELS_FIELD]))


def field_arrays(op: OpSchema, attributes: Mapping[str, int | float], kernels: int) -> dict[str, Any]:
    """What a plan stores: one array of one element per field."""
    arrays = {a.name: np.array([attributes[a.name]], _KINDS[a.type]) for a in op.attributes}
    return arrays | {KERNELS_FIELD: np.array([kernels], np.int32)}


def _read(op: OpSchema, attribute: Attribute, data: Any) -> int | float:
    if data is None:
        raise ValueError(f"{op.name}: the field {attribute.name} is missing.")
    array, kind = np.asarray(data), _KINDS[attribute.type]
    if array.dtype != kind or array.size != 1:
        raise ValueError(
            f"{op.name}: the field {attribute.name} is {array.size} values of {array.dtype}, expected 1 of {kind}."
        )
    value: int | float = array.reshape(()).item()
    if (attribute.type is int and value < 0) or not math.isfinite(value):
        raise ValueError(f"{op.name}: the field {attribute.name} is {value}, expected a finite number from 0 on.")
    return value
