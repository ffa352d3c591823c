"""bundle or checkpoint -> an FP8 checkpoint that other engines serve: what outgrows one GPU runs there.

The numbers are those of our own fp8 bundles: E4M3 weights with one float32 scale per output channel, activations
quantized dynamically per token. What is FP8 of that kind already is carried over bit for bit. Experts are written one
by one under their Hugging Face names, a file per layer, and multi-token-prediction layers go along.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import Parameter, layer_index, mtp_parameters, parameters, parts
from glm_export.exporter.pipeline import WAITING, default_threads, in_order
from glm_export.exporter.precision import HIGH_PRECISION, storage_dtype
from glm_export.exporter.progress import Reporter
from glm_export.exporter.source.checkpoint import CONFIG, Checkpoint
from glm_export.exporter.source.companions import companions, copy_companions
from glm_export.exporter.source.quantization_config import HF_QUANT_CONFIG
from glm_export.exporter.source.shards import INDEX
from glm_export.exporter.staging import Staging
from glm_export.exporter.storage import Block, WeightTensor, blocks, convert, scale_name
from glm_export.exporter.weight_file import WeightFile
from glm_export.runtime.errors import ResourceError, UsageError
from glm_export.runtime.files import HashingWriter, write_text_durably

Format = Literal["compressed-tensors", "modelopt"]
FORMATS: tuple[Format, ...] = ("compressed-tensors", "modelopt")

_KEPT_IN_MTP = "eh_proj.weight"
"""The one linear of a multi-token-prediction layer that the vendor does not quantize."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenCheckpoint:
    """What was written."""

    directory: Path
    format: Format
    weight_bytes: int
    files: int
    quantized: int
    """Matrices in FP8, experts counted one by one."""
    mtp: bool
    """Whether it has its multi-token-prediction layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """A parameter of the model, as the checkpoint stores it."""

    parameter: Parameter
    dtype: torch.dtype
    scale_columns: tuple[int, ...]
    """What follows the rows in the shape of a scale: (1,) or ()."""

    @property
    def fp8(self) -> bool:
        """Whether it is quantized."""
        return self.dtype == torch.float8_e4m3fn

    @property
    def precision(self) -> str:
        """The precision of ours that its numbers are of."""
        return "fp8" if self.fp8 else "bf16"

    def tensors(self) -> Iterator[WeightTensor]:
        """The tensors it becomes: experts one by one, each with its scales."""
        small = self.parameter.kind in HIGH_PRECISION
        for name, shape in parts(self.parameter).items():
            yield WeightTensor(name=name, shape=shape, dtype=self.dtype, small=small)
            if self.fp8:
                scale_shape = (shape[0], *self.scale_columns)
                yield WeightTensor(name=scale_name(name), shape=scale_shape, dtype=torch.float32, small=True)


def write_hf_checkpoint(
    source: Checkpoint, folder: Path, out: Path, format: Format, reporter: Reporter, *, threads: int | None = None
) -> WrittenCheckpoint:
    """Writes an FP8 checkpoint.

    Args:
        source: the weights, of a checkpoint or a bundle.
        folder: the one whose tokenizer, chat template and generation config are taken over.
        out: a new folder; it appears when it is complete.
        format: how the scales and the list of exceptions are spelled.
        reporter: where progress goes.
        threads: how many read and convert; as many as there are CPUs when None.

    Raises:
        UsageError: `out` exists, or as `Staging.open`.
        InputError: a weight is not finite, or as `companions`.
        IntegrityError: the source changed while it was read.
        ResourceError: the disk is too small or fails.
        LockedError: another process is writing it.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out} already exists; remove it or choose another place for the checkpoint.")
    taken_over = companions(folder)
    mtp = _mtp(source)
    stored = [_stored(source, parameter, format) for parameter in (*parameters(source.config).values(), *mtp)]
    files = _files(stored)
    needed = sum(layout.size for layout, _ in files)
    with Staging.open(out, replace=False) as staging:
        _write(source, taken_over, stored, files, staging.directory, format, reporter, threads or default_threads())
        staging.publish()
    return WrittenCheckpoint(
        directory=out,
        format=format,
        weight_bytes=needed,
        files=len(files),
        quantized=sum(len(parts(each.parameter)) for each in stored if each.fp8),
        mtp=bool(mtp),
    )


def _write(
    source: Checkpoint,
    taken_over: tuple[Path, ...],
    stored: list[_Stored],
    files: list[tuple[WeightFile, list[_Stored]]],
    directory: Path,
    format: Format,
    reporter: Reporter,
    threads: int,
) -> None:
    """Fills the directory; what an earlier process left in it is not used."""
    shutil.rmtree(directory)
    directory.mkdir()
    needed = sum(layout.size for layout, _ in files)
    if needed > (free := shutil.disk_usage(directory).free):
        raise ResourceError(
            f"The checkpoint needs {needed / 1e9:.1f} GB and {directory.parent} has {free / 1e9:.1f} GB free; "
            "free some space or write it elsewhere."
        )

    _write_weights(source, files, directory, reporter, threads)
    source.check_unchanged()
    copy_companions(taken_over, directory)
    for name, table in _tables(source.config, stored, files, format).items():
        write_text_durably(directory / name, json.dumps(table, indent=2) + "\n")


def _mtp(source: Checkpoint) -> tuple[Parameter, ...]:
    """The multi-token-prediction layers, all of them or, if anything of them is missing, none."""
    whole = mtp_parameters(source.config).keys() <= {parameter.name for parameter in source.mtp}
    return source.mtp if whole else ()


def _stored(source: Checkpoint, parameter: Parameter, format: Format) -> _Stored:
    dtype = storage_dtype("bf16" if parameter.name.endswith(_KEPT_IN_MTP) else "fp8", parameter.kind)
    if dtype == torch.float32 and parameter.kind != "router_bias":
        # Ours are float32 always; other engines want what the model was trained in, wherever that loses nothing.
        numbers = source.read(parameter)
        if torch.equal(numbers.bfloat16().float(), numbers.float()):
            dtype = torch.bfloat16
    # compressed-tensors keeps the axis that a scale is constant along, ModelOpt does not.
    return _Stored(parameter=parameter, dtype=dtype, scale_columns=(1,) if format == "compressed-tensors" else ())


def _files(stored: list[_Stored]) -> list[tuple[WeightFile, list[_Stored]]]:
    """One file per layer, named as Hugging Face names shards."""
    found = [list(members) for _, members in itertools.groupby(stored, key=lambda each: each.parameter.group)]
    return [
        (
            WeightFile.plan(
                f"model-{number:05d}-of-{len(found):05d}.safetensors",
                (tensor for each in members for tensor in each.tensors()),
                alignment=1,  # other engines do not know our padding
                metadata={"format": "pt"},
            ),
            members,
        )
        for number, members in enumerate(found, start=1)
    ]


def _write_weights(
    source: Checkpoint,
    files: list[tuple[WeightFile, list[_Stored]]],
    directory: Path,
    reporter: Reporter,
    threads: int,
) -> None:
    work = ((each, block) for _, members in files for each in members for block in blocks(source, each.parameter))
    total = sum(layout.size for layout, _ in files)
    converted = in_order(
        lambda item: (item[0], convert(source, item[1], item[0].precision)),
        work,
        threads=threads,
        ahead=threads + WAITING,
    )
    with reporter.stage("writing FP8 weights", total) as advance, closing(converted):
        for layout, members in files:
            count = sum(1 for each in members for _ in blocks(source, each.parameter))

            def pieces(count: int = count) -> Iterator[tuple[str, Tensor]]:
                for each, done in itertools.islice(converted, count):
                    values, *scale = (tensor for _, tensor in done.stored)
                    yield from _by_part(each, done.block, values.to(each.dtype), scale)
                    advance(done.nbytes)

            with HashingWriter(directory / layout.path) as writer:
                layout.write(writer, pieces())


def _by_part(each: _Stored, block: Block, values: Tensor, scale: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Cuts converted rows of a parameter where one tensor ends and the next one begins."""
    columns = block.piece.columns or 1
    part_first = 0
    for name, shape in parts(each.parameter).items():
        first, last = max(block.row, part_first), min(block.row + block.last - block.first, part_first + shape[0])
        if first < last:
            rows = slice(first - block.row, last - block.row)
            yield name, values.view(-1, columns)[rows]
            yield from ((scale_name(name), part[rows]) for part in scale)
        part_first += shape[0]


def _tables(
    config: Glm4MoeConfig, stored: list[_Stored], files: list[tuple[WeightFile, list[_Stored]]], format: Format
) -> dict[str, dict[str, Any]]:
    """The JSON files by name, config.json last."""
    weight_map = {tensor.name: layout.path for layout, _ in files for tensor in layout.tensors}
    size = sum(tensor.nbytes for layout, _ in files for tensor in layout.tensors)
    kept = [
        name.removesuffix(".weight")
        for each in stored
        if not each.fp8 and each.parameter.kind in ("linear", "lm_head", "router", "embedding")
        for name in parts(each.parameter)
    ]
    mtp = {layer_index(each.parameter.name) for each in stored} & set(config.mtp_layers)
    table = config.to_hf_dict() | {"dtype": "bfloat16", "num_nextn_predict_layers": len(mtp)}
    tables: dict[str, dict[str, Any]] = {INDEX: {"metadata": {"total_size": size}, "weight_map": weight_map}}
    if format == "modelopt":
        algorithm = {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
        producer = {"name": "glm-export"}
        caches = {"kv_cache_quant_algo": None}
        quantization = {"quant_method": "modelopt", **algorithm, "ignore": kept, "producer": producer}
        inner = {**algorithm, **caches, "exclude_modules": kept}
        tables[HF_QUANT_CONFIG] = {"producer": producer, "quantization": inner}
    else:
        quantization = _compressed_tensors(kept)
    tables[CONFIG] = table | {"quantization_config": quantization}
    return tables


def _compressed_tensors(kept: list[str]) -> dict[str, Any]:
    """quantization_config; TensorRT-LLM looks for a group of exactly this name."""
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
    }
