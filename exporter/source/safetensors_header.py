"""The header of one safetensors file, read more strictly than the library does.

The library takes duplicate, empty and hostile names, unknown fields and any number of tensors. Here, whatever a header
may say, its tensors have plain names and known dtypes and cover the file exactly, each byte once.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from pathlib import PurePath

from glm_export.exporter.config import parse_json
from glm_export.exporter.source.source_file import LARGEST_TEXT
from glm_export.runtime.errors import InputError

PREFIX_BYTES = 8
MOST_TENSORS = 150_000
"""In one file. The largest of these models has 46,000 linears, each with at most a weight and two scales."""
LONGEST_NAME = 256

ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8},
}

_FIELDS = {"dtype", "shape", "data_offsets"}
_MOST_DIMENSIONS = 8
_SPARE = 100_000  # for metadata
_LARGEST = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies: the half-open byte range in its file."""

    file: str
    dtype: str
    """As safetensors spells it: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


def header_length(prefix: bytes, size: int, source: str) -> int:
    """How long the header is that follows the first 8 bytes of a file.

    Raises:
        InputError: the file is too short, or the header longer than any honest one.
    """
    if size < PREFIX_BYTES:
        raise _refused(f"is {size} bytes long, expected a safetensors file", source)
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > LARGEST_TEXT:
        raise _refused(f"announces a {length}-byte header, more than {LARGEST_TEXT}", source)
    if size < PREFIX_BYTES + length:
        needed = PREFIX_BYTES + length
        raise _refused(f"truncated: is {size} bytes long, its header alone needs {needed}", source)
    return length


def parse_header(data: bytes, size: int, source: str) -> dict[str, StoredTensor]:
    """Reads a header.

    Args:
        data: the first 8 + N bytes of the file, N being what the first 8 say.
        size: of the whole file, in bytes.
        source: the file's path, for error messages; its last part becomes `StoredTensor.file`.

    Returns:
        The tensors by name, in the order of the header.

    Raises:
        InputError: the header is malformed, or its tensors do not cover the rest of the file exactly.
    """
    begin = PREFIX_BYTES + header_length(data, size, source)
    text = data[PREFIX_BYTES:begin]
    if not text.startswith(b"{"):
        raise _refused("its header does not start with '{', so it is no safetensors file", source)
    count = text.count(b'"data_offsets"')
    if count > MOST_TENSORS:
        raise _refused(f"has more than {MOST_TENSORS} tensors", source)
    refuse_bulk(text, source, keys=4 * count, lists=2 * count, objects=count)
    table = parse_json(text, f"{source} (header)")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused("__metadata__ is not a table of strings", source)
    if not table:
        raise _refused("has no tensors", source)
    file = PurePath(source).name
    tensors = {name: _stored_tensor(name, entry, begin, file, source) for name, entry in table.items()}

    position = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise _refused(f"{name} {what}", source)
        position = tensor.end
    if size != position:
        word = "truncated: " if size < position else ""
        raise _refused(f"{word}is {size} bytes long, expected {position}", source)
    return tensors


def refuse_bulk(text: bytes, source: str, *, keys: int, lists: int, objects: int) -> None:
    """Refuses JSON with far more in it than it needs, before it is parsed: a small object takes 50 times its text.

    Raises:
        InputError: more keys, lists or objects, or more values than an entry of a header has; strings with such
            characters in them count too.
    """
    for sign, most in ((b":", keys), (b",", 3 * keys), (b"[", lists), (b"{", objects)):
        if text.count(sign) > most + _SPARE:
            raise InputError(f"{source}: holds far more than it should; download it again from a source you trust.")


def is_plain_name(name: str) -> bool:
    """Whether a tensor name is harmless wherever it ends up: in a message, a graph, a file name."""
    return 0 < len(name) <= LONGEST_NAME and name.isprintable() and ".." not in name and not set(name) & set("/\\")


def _stored_tensor(name: str, entry: object, begin: int, file: str, source: str) -> StoredTensor:
    if not is_plain_name(name):
        raise _refused(f"the tensor name {reprlib.repr(name)} is empty or not a plain name", source)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        fields = sorted(entry) if isinstance(entry, dict) else []
        raise _refused(f"{name} has fields {reprlib.repr(fields)}, expected {sorted(_FIELDS)}", source)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _refused(f"{name} has the unknown dtype {reprlib.repr(dtype)}", source)
    if not _naturals(shape) or 0 in shape or len(shape) > _MOST_DIMENSIONS:
        seen = reprlib.repr(shape)
        raise _refused(f"{name} has shape {seen}, expected positive integers, at most {_MOST_DIMENSIONS}", source)
    if not _naturals(offsets) or len(offsets) != 2:
        raise _refused(f"{name} has data_offsets {reprlib.repr(offsets)}, expected two natural numbers", source)
    start, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]  # exact: Python's integers do not wrap around
    if end - start != expected:
        raise _refused(f"{name} has {end - start} bytes, its dtype and shape need {expected}", source)
    return StoredTensor(file=file, dtype=dtype, shape=tuple(shape), start=begin + start, end=begin + end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST for item in value)


def _refused(seen: str, source: str) -> InputError:
    return InputError(f"{source}: {seen}; download or convert this shard again.")
