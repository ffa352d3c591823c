"""Changes well-formed files into almost well-formed ones: somewhere in their JSON, or in their bytes.

Bytes that change at random hardly ever pass a JSON parser; a changed value in a file that is otherwise right gets to
the checks that matter.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

Json = Any

PATTERN = hashlib.shake_128(b"data").digest(1 << 12)
"""The data of a shard: no two ranges of a few bytes are the same, so a wrong range shows."""

_WORDS = (
    *(
        "",
        "a",
        "\0",
        "\x1b[2J",
        "a\nb",
        "..",
        "../x",
        "/etc/passwd",
        "C:\\x",
        "x.safetensors",
        "\ud800",
        "é",
        "\U0001f600",
    ),
    *(
        "__metadata__",
        "weight_map",
        "dtype",
        "shape",
        "data_offsets",
        "F8_E4M3",
        "BF16",
        "F4",
        "I64",
        "BOOL",
        "x" * 400,
    ),
    *(
        "quant_method",
        "fp8",
        "modelopt",
        "compressed-tensors",
        "channel",
        "block",
        "re:.*",
        "re:(a+)+$",
        "re:(",
        "*.gate",
    ),
    *("rope_scaling", "num_local_experts", "model.onnx", "manifest.json", "weights/../x", "0" * 64),
)
_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    8,
    16,
    64,
    127,
    128,
    255,
    4096,
    4097,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
)
_OTHERS: tuple[Json, ...] = (None, True, False, [], {}, [[]], [0], {"": 0}, 0.0, -0.0, 0.5, 1.0, 1e-5, 1e308, 10**400)
_BYTES = (
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b" ",
    b"\0",
    b"\xff",
    b"-",
    b"-0",
    b"1e9",
    b"NaN",
    b"Infinity",
)
_SPACES = (b" ", b"\n", b"\t", b"\r\n", b"\xef\xbb\xbf", b"\0", b"{}")


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """JSON text with something changed; any other bytes with some of them changed."""
    table = _parsed(data)
    if table is None or rng.random() < 0.15:
        return mutated_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        table = _changed(table, rng)
    text = json.dumps(table, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, None, 1)))
    return text.encode("utf-8", "surrogatepass")


def mutated_shard(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with something changed in its header, and, most of the time, a length and data that fit it."""
    length = int.from_bytes(data[:8], "little")
    text = mutated_json(data[8 : 8 + length], rng)
    if rng.random() < 0.1:
        text = rng.choice((text + rng.choice(_SPACES), rng.choice(_SPACES) + text))
    size = rng.choice((0, 1, 7, 8, 2**25, 2**63, 2**64 - 1)) if rng.random() < 0.05 else len(text)
    room = _end(_parsed(text)) + (rng.choice((-1, 1, 8)) if rng.random() < 0.05 else 0)
    return size.to_bytes(8, "little") + text + PATTERN[: max(room, 0)]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, removed, repeated or put in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        last = min(len(found), at + rng.choice((1, 1, 2, 8, 64)))
        ways: tuple[Callable[[], bytes], ...] = (
            lambda at=at, last=last: bytes(byte ^ 1 << rng.randrange(8) for byte in found[at:last]),  # type: ignore[misc]
            lambda: b"",
            lambda at=at, last=last: bytes(found[at:last] * 2),  # type: ignore[misc]
            lambda at=at, last=last: rng.choice(_BYTES) + bytes(found[at:last]),  # type: ignore[misc]
        )
        found[at:last] = rng.choice(ways)()
    return bytes(found)


def _parsed(text: bytes) -> Json:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _end(header: Json) -> int:
    """How many bytes of data a header asks for, if that is a sensible number."""
    ends = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and offsets and type(offsets[-1]) is int and 0 <= offsets[-1] <= len(PATTERN):
            ends.append(offsets[-1])
    return max(ends)


def _changed(value: Json, rng: random.Random) -> Json:
    """The value with one place in it changed."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        below = value[key]
        copy = dict(value) if isinstance(value, dict) else list(value)
        if isinstance(below, dict | list) and below and rng.random() < 0.7:
            copy[key] = _changed(below, rng)
            return copy
        way = rng.randrange(6)
        if way == 0:
            del copy[key]
        elif way == 1 and isinstance(copy, dict):
            copy[rng.choice(_WORDS)] = copy.pop(key)
        elif way == 1 or way == 2:
            other = rng.choice(keys)
            copy[key], copy[other] = copy[other], copy[key]
        elif way == 3 and isinstance(copy, dict):
            copy[rng.choice(_WORDS)] = _another(below, rng)
        elif way == 3:
            copy.insert(rng.randrange(len(copy) + 1), below)
        else:
            copy[key] = _another(below, rng)
        return copy
    return _another(value, rng)


def _another(value: Json, rng: random.Random) -> Json:
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, -value - 1, value))
    if isinstance(value, str) and value and rng.random() < 0.3:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(_WORDS) + value[at:]
    return rng.choice(rng.choice((_WORDS, _NUMBERS, _OTHERS)))


def mutated_manifest(data: bytes, rng: random.Random) -> bytes:
    """A manifest with something changed, and most of the time the hash of itself that fits."""
    text = mutated_json(data, rng)
    table = _parsed(text)
    if not isinstance(table, dict) or "sha256" not in table or rng.random() < 0.05:
        return text
    rest = {key: value for key, value in table.items() if key != "sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
    return json.dumps({**table, "sha256": digest}).encode()
