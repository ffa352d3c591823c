"""The GPUs that people serve these models on, and how many of each a model takes."""

from __future__ import annotations

from dataclasses import dataclass

USABLE = 0.9
"""The share of a GPU's memory that weights and caches may fill: the rest is the engine's own, and fragmentation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A kind of GPU."""

    name: str
    bytes: int
    """Of its memory."""
    compute_capability: str


GPUS = tuple(
    Gpu(name=name, bytes=gigabytes * 10**9, compute_capability=capability)
    for name, gigabytes, capability in (
        ("B200", 180, "10.0"),
        ("H200", 141, "9.0"),
        ("H100", 80, "9.0"),
        ("RTX PRO 6000", 96, "12.0"),
        ("L40S", 48, "8.9"),
    )
)


def gpus_needed(model_bytes: int, gpu: Gpu) -> int:
    """How many GPUs hold `model_bytes` of weights and caches, split evenly."""
    return max(1, -(-model_bytes // int(USABLE * gpu.bytes)))


def tensor_parallel_size(gpus: int, kv_heads: int) -> int | None:
    """The smallest even split over at least `gpus` GPUs: a power of two, and no KV head cut or kept twice.

    None where even one KV head per GPU is too few.
    """
    size = 1
    while size < gpus:
        size *= 2
    return size if kv_heads % size == 0 else None
