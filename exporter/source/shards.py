"""The safetensors files of a checkpoint as a set: what the index promises must be what the headers hold."""

from __future__ import annotations

import hashlib
import itertools
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from glm_export.exporter.config import parse_json, plural
from glm_export.exporter.source.safetensors_header import (
    MOST_TENSORS,
    PREFIX_BYTES,
    StoredTensor,
    header_length,
    is_plain_name,
    parse_header,
    refuse_bulk,
)
from glm_export.exporter.source.source_file import Stamp, open_regular, read_exactly, read_text_file
from glm_export.runtime.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_PICKLES = {".bin", ".pt", ".pth"}
_LISTED = 20
_COUNTED = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One safetensors file: size in bytes, digest of its header, tensors by name."""

    file: str
    stamp: Stamp
    header_sha256: str
    tensors: dict[str, StoredTensor]

    @property
    def size(self) -> int:
        """Of the file, in bytes."""
        return self.stamp.size


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What model.safetensors.index.json says."""

    weight_map: dict[str, str]
    """Tensor -> the plain name of its file."""
    total_size: int | None
    """Bytes of all tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSet:
    """All safetensors files of a folder."""

    shards: tuple[Shard, ...]
    tensors: dict[str, StoredTensor]
    """Of all files, by name."""
    extra: frozenset[str]
    """Files that the index does not know."""
    index: Index | None
    index_stamp: Stamp | None

    def check_total_size(self, source: str) -> None:
        """Checks that the index and the headers agree on how much there is.

        It may count all tensors, or those that it lists.

        Raises:
            InputError: they do not.
        """
        listed = sum(tensor.nbytes for tensor in self.tensors.values() if tensor.file not in self.extra)
        every = sum(tensor.nbytes for tensor in self.tensors.values())
        if self.index and self.index.total_size not in (None, listed, every):
            raise InputError(
                f"{source}: total_size is {self.index.total_size}, but the shards hold {listed} bytes of tensors; "
                "download the index and the shards that belong together, or correct it if they do."
            )


def read_shard_set(directory: Path) -> ShardSet:
    """Reads the index and the header of every safetensors file.

    Raises:
        InputError: a file is missing or malformed, a tensor is in two files, or the index is wrong about a tensor.
    """
    index, stamp = _read_index(directory)
    listed = sorted(set(index.weight_map.values())) if index else [SINGLE]
    extra = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in listed)
    shards = tuple(read_shard(directory / file) for file in (*listed, *extra))
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise InputError(
                    f"{directory}: {name} is stored in both {tensors[name].file} and {shard.file}; "
                    "remove the shard that does not belong to this checkpoint."
                )
            tensors[name] = tensor
    if index:
        refuse(directory, _index_problems(index, tensors, set(extra)), "the index asks")
    return ShardSet(shards=shards, tensors=tensors, extra=frozenset(extra), index=index, index_stamp=stamp)


def read_shard(path: Path) -> Shard:
    """Reads a file's header.

    Raises:
        InputError: not a regular file, or as `parse_header`.
    """
    with open_regular(path) as (descriptor, stamp):
        prefix = read_exactly(path, descriptor, 0, min(PREFIX_BYTES, stamp.size))
        length = header_length(prefix, stamp.size, str(path))
        data = prefix + read_exactly(path, descriptor, PREFIX_BYTES, length)
    tensors = parse_header(data, stamp.size, str(path))
    return Shard(file=path.name, stamp=stamp, header_sha256=hashlib.sha256(data).hexdigest(), tensors=tensors)


def parse_index(data: bytes, source: str) -> Index:
    """Reads an index.

    Args:
        data: the whole file.
        source: its path, for error messages.

    Raises:
        InputError: not such a JSON table, or an entry that is not a plain file name: the index comes with the
            download, and a path in it could point anywhere.
    """
    refuse_bulk(data, source, keys=MOST_TENSORS, lists=0, objects=0)
    table = parse_json(data, source)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{source}: has no weight_map; expected a table from tensor names to file names.")
    if len(weight_map) > MOST_TENSORS:
        raise InputError(f"{source}: lists more than {MOST_TENSORS} tensors; use the index of the checkpoint itself.")
    for name, file in weight_map.items():
        if not is_plain_name(name):
            raise InputError(f"{source}: the tensor name {reprlib.repr(name)} is empty or not a plain name.")
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise InputError(
                f"{source}: {name} is in {reprlib.repr(file)}, expected a plain file name ending in .safetensors."
            )
    metadata = table.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"{source}: metadata is {reprlib.repr(metadata)}, expected a table.")
    total = metadata.get("total_size")
    if isinstance(total, float) and total.is_integer():  # some writers divide
        total = int(total)
    if total is not None and (type(total) is not int or total < 0):
        raise InputError(f"{source}: total_size is {reprlib.repr(total)}, expected a number of bytes.")
    return Index(weight_map=weight_map, total_size=total)


def refuse(directory: Path, problems: Iterator[str], asks: str) -> None:
    """Raises an InputError that lists the first of the tensors' problems, if there are any."""
    found = list(itertools.islice(problems, _COUNTED + 1))  # a hostile config could ask for any number of tensors
    if found:
        count = f"more than {_COUNTED}" if len(found) > _COUNTED else str(len(found))
        more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise InputError(
            f"{directory}: {count} {plural('tensor', found)} not as {asks}: {'; '.join(found[:_LISTED])}{more}."
        )


def _read_index(directory: Path) -> tuple[Index | None, Stamp | None]:
    """The index, or None where the one shard needs none."""
    found = {path.name for path in directory.iterdir()}
    if INDEX in found:
        data, stamp = read_text_file(directory / INDEX)
        index = parse_index(data, str(directory / INDEX))
        files = set(index.weight_map.values())
        if missing := sorted(files - found):
            raise InputError(
                f"{directory}: {len(missing)} of {len(files)} shards missing ({', '.join(missing[:_LISTED])}); "
                "finish the download."
            )
        return index, stamp
    if SINGLE in found:
        return None, None
    if shard := min((name for name in found if name.endswith(".safetensors")), default=None):
        raise InputError(f"{directory}: has {shard} but neither {INDEX} nor {SINGLE}; copy the index as well.")
    if pickle := min((name for name in found if Path(name).suffix in _PICKLES), default=None):
        raise InputError(
            f"{directory}: has {pickle} but no safetensors; such files can run code when loaded and are never opened, "
            "so convert the checkpoint where that does no harm (transformers: from_pretrained, then save_pretrained)."
        )
    raise InputError(f"{directory}: has no weights; expected {INDEX} with its shards, or {SINGLE}.")


def _index_problems(index: Index, tensors: Mapping[str, StoredTensor], extra: set[str]) -> Iterator[str]:
    for name, file in index.weight_map.items():
        if name not in tensors:
            yield f"{name} is in the index but not in {file}"
        elif tensors[name].file != file:
            yield f"{name} is in {tensors[name].file}, not in {file} as the index says"
    for name, tensor in tensors.items():
        if tensor.file not in extra and name not in index.weight_map:
            yield f"{name} is in {tensor.file} but not in the index"
