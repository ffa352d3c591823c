"""From a checkpoint's parameters to the tensors a bundle stores: conversion and FP8 quantization, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_export.exporter.checkpoint import Checkpoint
from glm_export.exporter.layout import Parameter
from glm_export.exporter.precision import HIGH_PRECISION, storage_dtype
from glm_export.plugins.fp8 import quantize_rows
from glm_export.runtime.errors import InputError

BLOCK_ELEMENTS = 1 << 25
"""Parameters are converted in blocks of about this many elements, so that memory stays bounded for any model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightTensor:
    """A tensor of the bundle."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    small: bool
    """Norms, biases, router and scales: they lie together at the end of a file."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def scale_name(name: str) -> str:
    """The tensor that holds the row scales of an FP8 tensor."""
    return f"{name}_scale"


def stored_tensors(parameter: Parameter, precision: str) -> tuple[WeightTensor, ...]:
    """What a parameter becomes: itself in the storage dtype and, in FP8, its row scales [.., O] float32."""
    dtype = storage_dtype(precision, parameter.kind)
    small = parameter.kind in HIGH_PRECISION
    values = WeightTensor(name=parameter.name, shape=parameter.shape, dtype=dtype, small=small)
    if dtype != torch.float8_e4m3fn:
        return (values,)
    scale = WeightTensor(name=scale_name(parameter.name), shape=parameter.shape[:-1], dtype=torch.float32, small=True)
    return values, scale


def convert(checkpoint: Checkpoint, parameter: Parameter, precision: str) -> Iterator[tuple[str, Tensor]]:
    """Yields a parameter's stored tensors as (name, block) pieces; the blocks of a name follow each other in order.

    Raises:
        InputError: a weight is not finite, or becomes infinite in the storage dtype.
    """
    dtype = storage_dtype(precision, parameter.kind)
    for start, block in _blocks(checkpoint, parameter):
        if dtype == torch.float8_e4m3fn:
            _refuse_nonfinite(parameter, start, block, block)
            values, scale = quantize_rows(block)
            yield parameter.name, values
            yield scale_name(parameter.name), scale
        else:
            values = block.to(dtype)
            _refuse_nonfinite(parameter, start, block, values)
            yield parameter.name, values


def _blocks(checkpoint: Checkpoint, parameter: Parameter) -> Iterator[tuple[int, Tensor]]:
    """Blocks [n, ...] of a parameter along its first axis, with the index of their first row (or expert)."""
    if parameter.kind == "experts":
        for e in range(parameter.shape[0]):
            yield e, checkpoint.read_expert(parameter, e).unsqueeze(0)
        return
    rows = max(1, BLOCK_ELEMENTS * parameter.shape[0] // parameter.numel)
    for index, block in enumerate(checkpoint.read(parameter).split(rows)):
        yield index * rows, block


def _refuse_nonfinite(parameter: Parameter, start: int, source: Tensor, stored: Tensor) -> None:
    # A sum is not finite if any element is not; only then is it worth looking for the place.
    if stored.float().sum().isfinite():
        return
    bad = ~stored.isfinite()
    if not bad.any():
        return  # finite elements whose sum overflowed
    index = bad.nonzero()[0]
    value = source[tuple(index)].item()
    index[0] += start
    place = f"{parameter.name}{index.tolist()}"
    if source.isfinite().all():
        raise InputError(
            f"{place} is {value:g}, too large for {stored.dtype}; build with bf16, fp32 or fp8 instead of fp16."
        )
    raise InputError(f"{place} is {value}; a checkpoint must be finite: restore the tensor from its source.")
