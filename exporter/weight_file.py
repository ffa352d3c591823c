"""Weight files: valid safetensors and ONNX external data at once.

A file's layout is known before any weight is read: large tensors in model order (so q, k, v and gate, up are neighbours
that a target may view as one), then the small float32 ones. Every tensor starts at a multiple of 64 bytes; where shapes
do not give that by themselves, a named padding tensor does, because the safetensors format forbids holes.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_export.exporter.storage import WeightTensor
from glm_export.runtime.files import HashingWriter

FOLDER = "weights"
ALIGNMENT = 64
PADDING = "padding."

_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a tensor's bytes lie."""

    path: str
    """Relative to the bundle, with forward slashes."""
    offset: int
    """In bytes, from the start of the file."""
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """The layout of one file."""

    path: str
    header: bytes
    tensors: tuple[WeightTensor, ...]
    """In file order, without padding."""
    locations: dict[str, Location]
    size: int

    @classmethod
    def plan(
        cls,
        path: str,
        tensors: Iterable[WeightTensor],
        *,
        alignment: int = ALIGNMENT,
        metadata: Mapping[str, str] = types.MappingProxyType({}),
    ) -> WeightFile:
        """Lays out tensors.

        Args:
            path: of the file, as its locations name it.
            tensors: in model order.
            alignment: of every tensor, in bytes; 1 needs no padding.
            metadata: for the `__metadata__` of the format.
        """
        ordered = sorted(tensors, key=lambda tensor: tensor.small)  # stable: otherwise in model order
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        starts: dict[str, int] = {}
        end = 0
        for tensor in ordered:
            if gap := -end % alignment:
                entries[f"{PADDING}{len(entries)}"] = _entry("U8", (gap,), end, end + gap)
                end += gap
            starts[tensor.name] = end
            dtype = _SAFETENSORS_DTYPES[tensor.dtype]
            entries[tensor.name] = _entry(dtype, tensor.shape, end, end + tensor.nbytes)
            end += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        return cls(
            path=path,
            header=header,
            tensors=tuple(ordered),
            locations={
                tensor.name: Location(path=path, offset=len(header) + starts[tensor.name], length=tensor.nbytes)
                for tensor in ordered
            },
            size=len(header) + end,
        )

    def write(self, writer: HashingWriter, pieces: Iterable[tuple[str, Tensor]]) -> None:
        """Writes the file from (name, block) pieces, whose large tensors come in file order, block after block.

        The small tensors are kept until the large ones are written.
        """
        # Allocated at once: small blocks kept between large temporary ones would leave the heap full of holes.
        small = {t.name: torch.empty(math.prod(t.shape), dtype=t.dtype) for t in self.tensors if t.small}
        filled = dict.fromkeys(small, 0)
        writer.write(self.header)
        for name, block in pieces:
            if name in small:
                small[name][filled[name] : filled[name] + block.numel()] = block.view(-1)
                filled[name] += block.numel()
            else:
                self._append(writer, name, block)
        for name, tensor in small.items():
            assert filled[name] == len(tensor), (self.path, name)
            self._append(writer, name, tensor)
        assert writer.size == self.size, (self.path, writer.size, self.size)

    def _append(self, writer: HashingWriter, name: str, block: Tensor) -> None:
        location = self.locations[name]
        if writer.size < location.offset < writer.size + ALIGNMENT:
            writer.write(bytes(location.offset - writer.size))
        assert location.offset <= writer.size < location.offset + location.length, (self.path, name)
        writer.write(as_bytes(block))


def as_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().view(torch.uint8).numpy().data).cast("B")


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def all_locations(files: Iterable[WeightFile]) -> Iterator[tuple[str, Location]]:
    """(tensor name, location) over several files."""
    for file in files:
        yield from file.locations.items()
