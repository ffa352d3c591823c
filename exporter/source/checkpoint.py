"""Reads a safetensors checkpoint: checked as a whole before any byte of a weight is read, then piece by piece.

Opening reads config.json and the headers of all shards only. A parameter is gathered from pieces (one tensor, or the
experts one by one), and any rows of a piece can be read by themselves, from any thread: what is not used is never read,
and memory holds only what is asked for. Until the end, every file must stay as it was when it was opened.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glm_export.exporter.config import Glm4MoeConfig, parse_json
from glm_export.exporter.layout import QUANTIZED, Parameter, layer_index, parameters
from glm_export.exporter.source.inventory import (
    FP8,
    complete_mtp,
    is_unused,
    mtp_problems,
    problems,
    scale_of,
    stored_parts,
)
from glm_export.exporter.source.quantization_config import HF_QUANT_CONFIG, parse_quantization
from glm_export.exporter.source.quantized import PER_TOKEN, Quantization, Scheme
from glm_export.exporter.source.safetensors_header import StoredTensor
from glm_export.exporter.source.shards import INDEX, Shard, read_shard_set, refuse
from glm_export.exporter.source.source_file import (
    Stamp,
    check_stamp,
    open_regular,
    read_into,
    read_text_file,
    refuse_change,
)
from glm_export.plugins.fp8 import E4M3_MAX
from glm_export.runtime.errors import InputError

SOURCE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, FP8: torch.float8_e4m3fn}

CONFIG = "config.json"

_LARGEST_CONFIG = 5_000_000  # bytes: a list of all linears of the largest model would need 3 MB
_LARGEST_SCALE = torch.finfo(torch.float32).max / E4M3_MAX


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stored tensor that is a parameter or a part of one, as rows: [rows, columns], or [rows] in one dimension."""

    name: str
    tensor: StoredTensor
    scheme: Scheme | None = None
    """How it is scaled, if it is FP8."""
    scale: StoredTensor | None = None

    @property
    def rows(self) -> int:
        """All axes but the last, taken together."""
        return math.prod(self.tensor.shape[:-1]) if len(self.tensor.shape) > 1 else self.tensor.shape[0]

    @property
    def columns(self) -> int | None:
        """The last axis; None in one dimension."""
        return self.tensor.shape[-1] if len(self.tensor.shape) > 1 else None

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return SOURCE_DTYPES[self.tensor.dtype]

    @property
    def row_scaled(self) -> bool:
        """Whether it is FP8 with one scale per row, as our own fp8 is, so that it can be carried over as it is."""
        return self.scheme is not None and self.scheme.row_scaled(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a matrix."""
        assert self.columns is not None
        return self.rows, self.columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose tensors are exactly those that its config asks for; make one with `open`."""

    directory: Path
    config: Glm4MoeConfig
    config_sha256: str
    """Of config.json, and of hf_quant_config.json after it where there is one."""
    quantization: Quantization | None
    shards: tuple[Shard, ...]
    mtp_tensors: dict[str, StoredTensor]
    """Tensors of the multi-token-prediction layers, set aside."""
    mtp: tuple[Parameter, ...]
    """Their parameters that are complete, which can be read like the others."""
    ignored: tuple[str, ...]
    """Unknown config keys that the user vouched for."""

    _tensors: dict[str, StoredTensor]
    _stamps: dict[str, Stamp]
    """Of every file that was read."""

    @classmethod
    def open(cls, directory: str | Path, ignore: Collection[str] = ()) -> Checkpoint:
        """Reads the config and every shard's header, and checks all names, shapes and dtypes.

        Args:
            directory: holds config.json and the safetensors shards.
            ignore: unknown config keys to accept.

        Raises:
            InputError: anything that keeps the checkpoint from being read completely; tensors by name, all at once.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"{directory}: is no folder; expected a Hugging Face checkpoint folder.")
        stamps: dict[str, Stamp] = {}
        digest = hashlib.sha256()

        def table(name: str) -> dict[str, Any]:
            data, stamps[name] = read_text_file(directory / name, _LARGEST_CONFIG)
            digest.update(data)
            return parse_json(data, str(directory / name))

        source = str(directory / CONFIG)
        config_table = table(CONFIG)
        config = Glm4MoeConfig.from_dict(config_table, source=source, ignore=ignore)
        # A broken link too is a file that should be read.
        hf_quant = table(HF_QUANT_CONFIG) if os.path.lexists(directory / HF_QUANT_CONFIG) else None
        quantization = parse_quantization(config_table, hf_quant, source, ignore)

        found = read_shard_set(directory)
        stamps |= {shard.file: shard.stamp for shard in found.shards}
        if found.index_stamp:
            stamps[INDEX] = found.index_stamp
        mtp = {name: tensor for name, tensor in found.tensors.items() if layer_index(name) in config.mtp_layers}
        main = {name: tensor for name, tensor in found.tensors.items() if name not in mtp}

        def wrong() -> Iterator[str]:
            for name, tensor in main.items():
                if tensor.file in found.extra:
                    yield f"{name} in {tensor.file}, which the index does not list and which may only hold MTP layers"
            yield from problems(config, quantization, main)
            yield from mtp_problems(config, quantization, mtp)

        refuse(directory, wrong(), "config.json asks")
        found.check_total_size(str(directory / INDEX))
        if quantization and not any(tensor.dtype == FP8 for tensor in found.tensors.values()):
            raise InputError(f"{source}: has a quantization_config, but no weight is FP8; remove it.")
        return cls(
            directory=directory,
            config=config,
            config_sha256=digest.hexdigest(),
            quantization=quantization,
            shards=found.shards,
            mtp_tensors=mtp,
            mtp=complete_mtp(config, quantization, mtp),
            ignored=tuple(sorted(ignore)),
            _tensors=found.tensors,
            _stamps=stamps,
        )

    def with_layers(self, num_hidden_layers: int) -> Checkpoint:
        """The same checkpoint cut after its first layers, which no MTP layer fits.

        Raises:
            UsageError: it has fewer.
        """
        if num_hidden_layers == self.config.num_hidden_layers:
            return self
        return dataclasses.replace(self, config=self.config.with_layers(num_hidden_layers), mtp=())

    def pieces(self, parameter: Parameter) -> tuple[Piece, ...]:
        """The stored tensors that a parameter is gathered from, in the order of its rows."""
        return tuple(self._piece(name) for name in stored_parts(parameter, self._tensors))

    def source_dtype(self, parameter: Parameter) -> torch.dtype:
        """The dtype in which the checkpoint stores a parameter; all experts of a parameter share one."""
        return self._piece(next(iter(stored_parts(parameter, self._tensors)))).dtype

    def read(self, parameter: Parameter) -> Tensor:
        """A whole parameter's numbers: in the source dtype, or dequantized in float32 if that is FP8."""
        pieces = self.pieces(parameter)
        if len(pieces) == 1:
            return self.read_numbers(pieces[0], 0, pieces[0].rows).view(parameter.shape)
        numbers = torch.empty(parameter.shape, dtype=torch.float32 if pieces[0].scheme else pieces[0].dtype)
        rows = numbers.view(-1, parameter.shape[-1])
        position = 0
        for piece in pieces:
            rows[position : position + piece.rows] = self.read_numbers(piece, 0, piece.rows)
            position += piece.rows
        return numbers

    def read_numbers(self, piece: Piece, first: int, last: int) -> Tensor:
        """The numbers in the rows first..last of a piece: in the source dtype, or dequantized in float32 if it is FP8.

        Raises:
            InputError: a read error, or a scale that is none.
            IntegrityError: the file is not what it was when it was opened.
        """
        values = self._read_rows_of(piece.tensor, first, last)
        if piece.scheme is None:
            return values
        return values.float().mul_(piece.scheme.of_rows(self._read_scale(piece), first, last, piece.shape))

    def read_fp8(self, piece: Piece, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The rows first..last of a `row_scaled` piece as they are; raises as `read_numbers`.

        Returns:
            values [n, I] float8_e4m3fn, bit for bit, and their row scales [n] float32, widened exactly.
        """
        assert piece.scheme is not None
        assert piece.row_scaled
        values = self._read_rows_of(piece.tensor, first, last)
        nan = (values.view(torch.uint8) & 0x7F) == 0x7F  # E4M3 has no infinity, and this is its one NaN
        if nan.any():
            row, column = nan.nonzero()[0].tolist()
            raise InputError(
                f"{piece.name}[{first + row}, {column}] is nan; a checkpoint must be finite: restore the tensor from "
                "its source."
            )
        scale = piece.scheme.of_rows(self._read_scale(piece), first, last, piece.shape)
        return values, scale[:, 0].contiguous()

    def check_unchanged(self) -> None:
        """Checks that every file is the one that was opened.

        Raises:
            IntegrityError: one was written to, replaced or removed.
        """
        for file, stamp in self._stamps.items():
            check_stamp(self.directory / file, stamp)

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another without reading its weights; no absolute paths."""
        return {
            "config_sha256": self.config_sha256,
            "ignored_config_keys": list(self.ignored),
            "shards": [{"file": s.file, "size": s.size, "header_sha256": s.header_sha256} for s in self.shards],
        }

    def remarks(self, precision: str) -> tuple[str, ...]:
        """What somebody who builds in a precision should know about this source, a sentence each."""
        found = []
        if self.mtp_tensors:
            layers = ", ".join(str(i) for i in sorted({layer_index(name) or 0 for name in self.mtp_tensors}))
            own = [word for word in ("embed_tokens", "shared_head.head") if any(word in n for n in self.mtp_tensors)]
            also = f", with its own {' and '.join(own)}" if own else ""
            found.append(
                f"Layer {layers} is for multi-token prediction{also}: {len(self.mtp_tensors)} tensors set aside."
            )
        if self.quantization is None:
            return tuple(found)
        counts: Counter[str] = Counter()
        activations = set()
        for parameter in parameters(self.config).values():
            piece = self.pieces(parameter)[0]
            if piece.scheme:
                activations.add(piece.scheme.activations)
            if parameter.kind not in QUANTIZED.get(precision, ()):
                counts["dequantized once"] += piece.scheme is not None
            elif piece.row_scaled:
                counts[f"carried over bit for bit ({piece.scheme})"] += 1
            elif piece.scheme:
                counts[f"quantized once more, per channel ({piece.scheme})"] += 1
            else:
                counts["not quantized in the checkpoint, quantized here"] += 1
        how = "; ".join(f"{count} {what}" for what, count in counts.items() if count)
        found.append(f"FP8 weights ({self.quantization.method}): {how}.")
        if precision in QUANTIZED and activations != {PER_TOKEN}:
            seen = ", ".join(sorted(activations)) or "nowhere"
            found.append(f"The checkpoint is made for activations quantized {seen}; here they are {PER_TOKEN}.")
        if unused := sum(is_unused(name, self.quantization) for name in self._tensors):
            found.append(f"{unused} scales for activations or the KV cache are not used.")
        return tuple(found)

    def _piece(self, name: str) -> Piece:
        tensor = self._tensors[name]
        if tensor.dtype != FP8:
            return Piece(name=name, tensor=tensor)
        scale = scale_of(name, self._tensors)
        assert self.quantization is not None
        assert scale is not None
        scheme = self.quantization.scheme(name.removesuffix(".weight"))
        return Piece(name=name, tensor=tensor, scheme=scheme, scale=self._tensors[scale])

    def _read_scale(self, piece: Piece) -> Tensor:
        assert piece.scale is not None
        scale = self._read_rows_of(piece.scale, 0, None).float()
        good = (scale > 0) & (scale <= _LARGEST_SCALE)  # no NaN is
        if not good.all():
            index = (~good).nonzero()[0].tolist()
            raise InputError(
                f"{piece.name} has the scale {scale[tuple(index)].item():g} at {index}, expected a positive number; "
                "restore the tensor from its source."
            )
        return scale

    def _read_rows_of(self, tensor: StoredTensor, first: int, last: int | None) -> Tensor:
        """Some rows of a tensor seen as [rows, columns] or [rows]; without `last` all of it, in its own shape."""
        dtype = SOURCE_DTYPES[tensor.dtype]
        shape = tensor.shape
        width = shape[-1] * dtype.itemsize if len(shape) > 1 else dtype.itemsize
        start, end = tensor.start, tensor.end
        if last is not None:
            start, end = tensor.start + first * width, tensor.start + last * width
            shape = (last - first, *shape[1:][-1:])
        buffer = torch.empty(end - start, dtype=torch.uint8)
        path = self.directory / tensor.file
        with open_regular(path) as (descriptor, stamp):
            refuse_change(path, self._stamps[tensor.file], stamp)
            read_into(path, descriptor, start, memoryview(buffer.numpy().data))
        return buffer.view(dtype).view(shape)
