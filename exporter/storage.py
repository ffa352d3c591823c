"""From a checkpoint's parameters to the tensors a bundle stores: conversion and FP8 quantization, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_export.exporter.layout import Parameter
from glm_export.exporter.precision import HIGH_PRECISION, storage_dtype
from glm_export.exporter.source.checkpoint import Checkpoint, Piece
from glm_export.exporter.source.quantized import RoundingError
from glm_export.plugins.fp8_native import quantize_rows
from glm_export.runtime.errors import InputError, UsageError

BLOCK_ELEMENTS = 1 << 21
"""Parameters are converted in blocks of at most about this many elements, so that memory stays bounded for any model,
and a block that was read is still in a cache when it is quantized, hashed and written."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Rows first .. last of a piece of a parameter."""

    parameter: Parameter
    piece: Piece
    first: int
    last: int
    row: int
    """Where the first one is among the rows of the parameter."""

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return (self.last - self.first) * (self.piece.columns or 1)

    @property
    def source_bytes(self) -> int:
        """What is read for it."""
        return self.elements * self.piece.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A block as the bundle stores it."""

    block: Block
    stored: tuple[tuple[str, Tensor], ...]
    """By name: the part of each stored tensor that this block is, in one dimension."""
    rounding: RoundingError | None = None
    """Where FP8 numbers had to be quantized once more."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(part.nbytes for _, part in self.stored)


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


def blocks(checkpoint: Checkpoint, parameter: Parameter) -> Iterator[Block]:
    """The blocks of a parameter, in the order of its rows."""
    row = 0
    for piece in checkpoint.pieces(parameter):
        rows = max(1, BLOCK_ELEMENTS // (piece.columns or 1))
        for first in range(0, piece.rows, rows):
            last = min(first + rows, piece.rows)
            yield Block(parameter=parameter, piece=piece, first=first, last=last, row=row)
            row += last - first


def convert(checkpoint: Checkpoint, block: Block, precision: str) -> Converted:
    """Reads a block and makes of it what the bundle stores. Safe to call from several threads.

    Raises:
        InputError: a weight is not finite, or becomes infinite in the storage dtype.
        UsageError: GLM_EXPORT_CPU asks for what this machine can not run.
    """
    name = block.parameter.name
    dtype = storage_dtype(precision, block.parameter.kind)
    if dtype == torch.float8_e4m3fn:
        if block.piece.row_scaled:  # our own scheme: carried over bit for bit
            values, scale = checkpoint.read_fp8(block.piece, block.first, block.last)
            rounding = None
        else:
            source = checkpoint.read_numbers(block.piece, block.first, block.last)
            try:
                quantized = quantize_rows(source)
            except ValueError as error:  # GLM_EXPORT_CPU
                raise UsageError(f"{error} Choose another form of the kernels, or unset it.") from None
            if quantized is None:
                raise _not_finite(block, source, source)
            values, scale = quantized
            rounding = RoundingError.of(source, values, scale) if block.piece.scheme else None
        stored = ((name, values.view(-1)), (scale_name(name), scale))
        return Converted(block=block, stored=stored, rounding=rounding)
    source = checkpoint.read_numbers(block.piece, block.first, block.last)
    values = source.to(dtype)
    if not all(extreme.isfinite() for extreme in values.aminmax()):  # both are NaN if any element is
        raise _not_finite(block, source, values)
    return Converted(block=block, stored=((name, values.view(-1)),))


def _not_finite(block: Block, source: Tensor, values: Tensor) -> InputError:
    """The error that names the first element of `values` that is not finite."""
    row, *column = (~values.isfinite()).nonzero()[0].tolist()
    value = source[(row, *column)].item()
    shape = block.parameter.shape
    rows = torch.unravel_index(torch.tensor(block.row + row), shape[:-1] if column else shape)
    place = f"{block.parameter.name}{[*(int(i) for i in rows), *column]}"
    if source.isfinite().all():
        return InputError(
            f"{place} is {value:g}, too large for {values.dtype}; build with bf16, fp32 or fp8 instead of fp16."
        )
    return InputError(f"{place} is {value}; a checkpoint must be finite: restore the tensor from its source.")
