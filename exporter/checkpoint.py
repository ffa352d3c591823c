"""Reads a safetensors checkpoint: checked as a whole before any byte of a weight is read, then tensor by tensor.

Opening reads config.json and the headers of all shards only. A tensor is a view of a memory map, so what is not used is
never read, and a build holds no more of the source than the expert it works on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import mmap
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm_export.exporter.config import Glm4MoeConfig, parse_json, plural
from glm_export.exporter.layout import TIED, Parameter, expert_parts, layer_index, parameters, parts
from glm_export.runtime.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

SOURCE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8},
}
_LARGEST_HEADER = 25_000_000  # what the Hugging Face Hub accepts; the largest of these models need less than 10 MB
_FIELDS = {"dtype", "shape", "data_offsets"}
_LISTED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies: the half-open byte range in its shard."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One safetensors file: size in bytes, digest of its header, tensors by name."""

    file: str
    size: int
    header_sha256: str
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose tensors are exactly those that its config asks for; make one with `open`."""

    directory: Path
    config: Glm4MoeConfig
    config_sha256: str
    shards: tuple[Shard, ...]
    mtp_tensors: dict[str, StoredTensor]
    """Tensors of the multi-token-prediction layers, set aside."""
    ignored: tuple[str, ...]
    """Unknown config keys that the user vouched for."""

    _tensors: dict[str, StoredTensor]

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
        config_bytes = _read(directory, "config.json", "a Hugging Face checkpoint folder")
        source = str(directory / "config.json")
        config = Glm4MoeConfig.from_dict(parse_json(config_bytes, source), source=source, ignore=ignore)

        files, extra = _shard_files(directory)
        shards = tuple(read_shard(directory / file) for file in (*files, *extra))
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            for name, tensor in shard.tensors.items():
                if name in tensors:
                    raise InputError(
                        f"{directory}: {name} is stored in both {tensors[name].file} and {shard.file}; "
                        "remove the shard that does not belong to this checkpoint."
                    )
                tensors[name] = tensor
        mtp = {name: tensor for name, tensor in tensors.items() if layer_index(name) in config.mtp_layers}
        problems = [
            *_index_problems(files, tensors),
            *(
                f"{name} in {tensor.file}, which the index does not list and which may only hold MTP layers"
                for name, tensor in tensors.items()
                if tensor.file in extra and name not in mtp
            ),
            *_layout_problems(config, {name: tensor for name, tensor in tensors.items() if name not in mtp}),
        ]
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise InputError(
                f"{directory}: {len(problems)} {plural('tensor', problems)} not as config.json asks: "
                f"{'; '.join(problems[:_LISTED])}{more}."
            )
        digest = hashlib.sha256(config_bytes).hexdigest()
        return cls(
            directory=directory,
            config=config,
            config_sha256=digest,
            shards=shards,
            mtp_tensors=mtp,
            ignored=tuple(sorted(ignore)),
            _tensors=tensors,
        )

    def with_layers(self, num_hidden_layers: int) -> Checkpoint:
        """The same checkpoint cut after its first layers.

        Raises:
            UsageError: it has fewer.
        """
        return dataclasses.replace(self, config=self.config.with_layers(num_hidden_layers))

    def source_dtype(self, parameter: Parameter) -> torch.dtype:
        """The dtype in which the checkpoint stores a parameter; all experts of a parameter share one."""
        name = parameter.name if parameter.name in self._tensors else next(iter(parts(parameter)))
        return SOURCE_DTYPES[self._tensors[name].dtype]

    def read(self, parameter: Parameter) -> torch.Tensor:
        """A whole parameter in its source dtype, of the parameter's shape.

        It is a view of the file unless the experts are stored one by one; those are gathered into new memory.
        """
        if parameter.name in self._tensors:
            return self._view(parameter.name)
        packed = torch.empty(parameter.shape, dtype=self.source_dtype(parameter))
        for e in range(parameter.shape[0]):
            torch.cat([self._view(name) for name in expert_parts(parameter, e)], out=packed[e])
        return packed

    def read_expert(self, parameter: Parameter, e: int) -> torch.Tensor:
        """One expert of an experts parameter in its source dtype: [2F, D] or [D, F]."""
        if parameter.name in self._tensors:
            return self._view(parameter.name)[e]
        pieces = [self._view(name) for name in expert_parts(parameter, e)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another without reading its weights; no absolute paths."""
        return {
            "config_sha256": self.config_sha256,
            "ignored_config_keys": list(self.ignored),
            "shards": [{"file": s.file, "size": s.size, "header_sha256": s.header_sha256} for s in self.shards],
        }

    def _view(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        dtype = SOURCE_DTYPES[tensor.dtype]
        skip = tensor.start % mmap.ALLOCATIONGRANULARITY
        # One map per tensor, gone with it: what was read does not count as our memory for longer than it is used.
        # It is copy-on-write, so to torch it is writable (no warning), but no write ever reaches the file.
        with (self.directory / tensor.file).open("rb") as file:
            buffer = mmap.mmap(
                file.fileno(), tensor.end - tensor.start + skip, access=mmap.ACCESS_COPY, offset=tensor.start - skip
            )
        if skip % dtype.itemsize:  # legal in the file, but not for a typed view
            return torch.frombuffer(bytearray(buffer[skip:]), dtype=dtype).view(tensor.shape)
        return torch.frombuffer(buffer, dtype=dtype, offset=skip).view(tensor.shape)


def read_shard(path: Path) -> Shard:
    """Reads a safetensors header more strictly than the library, which accepts duplicate and hostile names.

    Raises:
        InputError: not a regular file, truncated, or not exactly covered by well-formed tensors.
    """

    def refuse_unless(good: bool, seen: str) -> None:
        if not good:
            raise InputError(f"{path}: {seen}; download or convert this shard again.")

    try:
        # A symbolic link is fine here (the Hugging Face cache is made of them): the source is only ever read.
        refuse_unless(stat.S_ISREG(os.stat(path).st_mode), "not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            refuse_unless(size >= 8, f"is {size} bytes long, expected a safetensors file")
            refuse_unless(length <= _LARGEST_HEADER, f"announces a {length}-byte header, more than {_LARGEST_HEADER}")
            refuse_unless(size >= 8 + length, f"truncated: is {size} bytes long, its header alone needs {8 + length}")
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: can not be read ({error.strerror}); the checkpoint is incomplete.") from None
    refuse_unless(header.startswith(b"{"), "its header does not start with '{', so it is no safetensors file")

    table = parse_json(header, f"{path} (header)")
    metadata = table.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    refuse_unless(strings, "__metadata__ is not a table of strings")
    tensors: dict[str, StoredTensor] = {}
    for name, entry in table.items():
        plain = name and name.isprintable() and ".." not in name and not set(name) & set("/\\")
        refuse_unless(bool(plain), f"the tensor name {name!r} is empty or not a plain name")
        keys = set(entry) if isinstance(entry, dict) else set()
        refuse_unless(keys == _FIELDS, f"{name} has fields {sorted(keys)}, expected {sorted(_FIELDS)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        refuse_unless(isinstance(dtype, str) and dtype in _ITEM_BYTES, f"{name} has the unknown dtype {dtype!r}")
        refuse_unless(_naturals(shape) and 0 not in shape, f"{name} has shape {shape!r}, expected positive integers")
        refuse_unless(_naturals(offsets) and len(offsets) == 2, f"{name} has data_offsets {offsets!r}, expected two")
        start, end = offsets
        expected = math.prod(shape) * _ITEM_BYTES[dtype]
        refuse_unless(end - start == expected, f"{name} has {end - start} bytes, its dtype and shape need {expected}")
        begin = 8 + length
        tensors[name] = StoredTensor(
            file=path.name, dtype=dtype, shape=tuple(shape), start=begin + start, end=begin + end
        )
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
        refuse_unless(tensor.start == position, f"{name} {what}")
        position = tensor.end
    word = "truncated: " if size < position else ""
    refuse_unless(size == position, f"{word}is {size} bytes long, expected {position}")
    return Shard(file=path.name, size=size, header_sha256=hashlib.sha256(prefix + header).hexdigest(), tensors=tensors)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _read(directory: Path, name: str, what: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        seen = "is no folder" if not directory.is_dir() else f"has no readable {name} ({error.strerror})"
        raise InputError(f"{directory}: {seen}; expected {what}.") from None


def _shard_files(directory: Path) -> tuple[dict[str, set[str]], list[str]]:
    """The shards with the tensors the index promises in each, and the safetensors files the index does not know."""
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if (directory / INDEX).exists():
        source = str(directory / INDEX)
        weight_map = parse_json(_read(directory, INDEX, "its index"), source).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{source}: has no weight_map; expected a table from tensor names to file names.")
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            # The index comes with the download: a path in it could point anywhere.
            plain = isinstance(file, str) and file.isprintable() and not set(file) & set("/\\")
            if not plain or not file.endswith(".safetensors"):
                raise InputError(f"{source}: {name} is in {file!r}, expected a plain file name ending in .safetensors.")
            files.setdefault(file, set()).add(name)
        missing = sorted(file for file in files if not (directory / file).exists())
        if missing:
            raise InputError(
                f"{directory}: {len(missing)} of {len(files)} shards missing ({', '.join(missing[:_LISTED])}); "
                "finish the download."
            )
        return files, [file for file in found if file not in files]
    if SINGLE in found:
        return {SINGLE: set()}, [file for file in found if file != SINGLE]
    if found:
        raise InputError(f"{directory}: has {found[0]} but neither {INDEX} nor {SINGLE}; copy the index as well.")
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        raise InputError(
            f"{directory}: has {pickles[0]} but no safetensors; such files can run code when loaded and are never "
            "opened, so convert the checkpoint to safetensors first."
        )
    raise InputError(f"{directory}: has no weights; expected {INDEX} with its shards, or {SINGLE}.")


def _index_problems(files: dict[str, set[str]], tensors: dict[str, StoredTensor]) -> Iterator[str]:
    if set(files) == {SINGLE} and not files[SINGLE]:
        return  # there is no index
    listed = {name: file for file, names in files.items() for name in sorted(names)}
    for name, file in listed.items():
        if name not in tensors:
            yield f"{name} is in the index but not in {file}"
        elif tensors[name].file != file:
            yield f"{name} is in {tensors[name].file}, not in {file} as the index says"
    for name, tensor in tensors.items():
        if tensor.file in files and name not in listed:
            yield f"{name} is in {tensor.file} but not in the index"


def _layout_problems(config: Glm4MoeConfig, tensors: dict[str, StoredTensor]) -> Iterator[str]:
    """Every tensor that is missing, unexpected, or of another shape or dtype than the layout's."""
    unexpected = dict(tensors)
    if config.tie_word_embeddings:
        for name in TIED:  # as in transformers, a copy that some writers store all the same does not count
            unexpected.pop(name, None)
    for parameter in parameters(config).values():
        packed = parameter.name in tensors
        first_dtype: str | None = None
        for name, shape in ({parameter.name: parameter.shape} if packed else parts(parameter)).items():
            tensor = unexpected.pop(name, None)
            if tensor is None:
                yield f"{name} is missing"
                continue
            first_dtype = first_dtype or tensor.dtype
            if tensor.shape != shape:
                yield f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
            if tensor.dtype not in SOURCE_DTYPES:
                yield f"{name} is {tensor.dtype}, expected one of {', '.join(SOURCE_DTYPES)}"
            elif tensor.dtype != first_dtype:
                yield f"{name} is {tensor.dtype}, but other experts of its layer are {first_dtype}"
    yield from (f"{name} is unexpected" for name in unexpected)
