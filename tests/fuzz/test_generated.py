"""Generated input for everything that reads bytes: a small, always equal part of `make fuzz`, and what takes most.

Time is that of this process, so that a busy machine does not matter; memory is measured in a second run.
"""

from __future__ import annotations

import json
import random
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import BUNDLE, CHECKPOINT, CONFIG_TABLE, Target, shards

TARGETS = {**CHECKPOINT, **BUNDLE}
TAKEN_AT_LEAST = 3
"""Of a hundred mutated files; as many must be refused. Else the mutations would test one half only."""


def quick(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_taken(name: str) -> None:
    target = TARGETS[name]
    assert all(target.read(seed) for seed in target.seeds())


@pytest.mark.parametrize("name", TARGETS)
def test_almost_well_formed(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    outcomes = []

    @quick(400)
    @given(seed=st.sampled_from(seeds), times=st.integers(1, 3), number=st.integers(0, 2**32))
    def check(seed: bytes, times: int, number: int) -> None:
        rng = random.Random(number)
        for _ in range(times):
            seed = target.mutated(seed, rng)
        outcomes.append(measured(target, seed))

    check()
    share = 100 * sum(outcomes) / len(outcomes)
    assert TAKEN_AT_LEAST <= share <= 100 - TAKEN_AT_LEAST, share


@quick(100)
@given(data=st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    for target in TARGETS.values():
        measured(target, data)


def json_values() -> st.SearchStrategy[object]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    return st.recursive(
        leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=8), inner), max_leaves=4
    )


@quick(100)
@given(value=st.dictionaries(st.text(max_size=8), json_values(), max_size=3))
def test_any_json(value: object) -> None:
    text = json.dumps(value).encode()
    for name, target in TARGETS.items():
        measured(target, len(text).to_bytes(8, "little") + text if name == "header" else text)


SECONDS = 2.0
SPARE_BYTES = 64e6
FACTOR = {"header": 12, "index": 12, "config": 40, "quantization": 40, "manifest": 60}
"""Bytes of memory that a byte of text may cost. At worst `{},` or `"ă",` are one Python object: 64 bytes for 3, 78 for
5, and the text itself stands there in 4 bytes a letter; what is written back and compared costs it once more. Where a
text may be 25 MB long, values are counted before it is parsed, so that what is left are entries: each has at least
100 letters here and takes a table of three (184 bytes), two lists and a tuple (200), numbers, names and a record (400).
"""


def measured(target: Target, data: bytes) -> bool:
    """Whether the bytes are taken; asserts that it took neither long nor much."""
    started = time.process_time()
    taken = target.read(data)
    assert time.process_time() - started < SECONDS
    tracemalloc.start()
    assert target.read(data) == taken
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    factor = next(FACTOR[name] for name, each in TARGETS.items() if each is target)
    assert most < factor * len(data) + SPARE_BYTES, most / len(data)
    return taken


def many(first: str, item: str, last: str, size: int) -> str:
    return first + item * (size // len(item.encode())) + last


def bombs(size: int) -> dict[str, str]:
    """Texts of JSON objects of about so many bytes, each of which costs its reader more than it looks."""
    return {
        "texts of a letter": many('{"a":["ă"', ',"ă"', "]}", size),
        "astral letters": many('{"a":["\U0001f600"', ',"ab"', "]}", size),
        "floats": many('{"a":[0.5', ",0.5", "]}", size),
        "objects": many('{"a":[{}', ",{}", "]}", size),
        "keys": "{" + ",".join(f'"{i}":{{}}' for i in range(size // 12)) + "}",
        "long numbers": many('{"a":[0', "," + "9" * 4300, "]}", size),
        "numbers too long": '{"a":' + "9" * size + "}",
        "long key": '{"' + "k" * size + '":1}',
        "long key twice": '{"' + "k" * (size // 2) + '":1,"' + "k" * (size // 2) + '":1}',
        "long text": '{"model_type":"' + "k" * size + '"}',
        "quotes": many('{"a":"', '\\"', '"}', size),
        "open lists": '{"a":' + "[" * size,
        "deep lists": '{"a":' + "[" * (size // 2) + "]" * (size // 2) + "}",
    }


def put_into(name: str, text: str) -> list[bytes]:
    """The text as the whole file, and as far inside of an otherwise good one as a reader gets."""
    inner, value = text[1:-1], text[1:-1].partition(":")[2]
    if name == "header":
        whole = text.encode()
        return [len(whole).to_bytes(8, "little") + whole]
    if name == "index":
        return [text.encode(), b'{"weight_map":%b}' % text.encode()]
    if name == "config":
        without = {key: item for key, item in CONFIG_TABLE.items() if key != "eos_token_id"}
        return [
            f"{json.dumps(CONFIG_TABLE)[:-1]},{inner}}}".encode(),
            f'{json.dumps(without)[:-1]},"eos_token_id":{value}}}'.encode(),
        ]
    if name == "quantization":
        start = '{"config":{"quantization_config":{"quant_method":"fp8",'
        return [f"{start}{inner}}}}}}}".encode(), f'{start}"modules_to_not_convert":{value}}}}}}}'.encode()]
    good = TARGETS["manifest"].seeds()[0].decode()
    tables = ("files", "versions", "engines", "recipe")
    return [good.replace(f'"{key}": {{', f'"{key}": {{{inner},', 1).encode() for key in tables]


@pytest.mark.parametrize("bomb", bombs(1))
@pytest.mark.parametrize("name", TARGETS)
def test_bomb(name: str, bomb: str) -> None:
    size = 8_000_000 if name in ("header", "index") else 300_000
    for data in put_into(name, bombs(size)[bomb]):
        measured(TARGETS[name], data)


def test_as_many_tensors_as_a_shard_may_have() -> None:
    header = {
        f"model.layers.{i}.mlp.experts.{i}.up_proj.weight_scale": {
            "dtype": "U8",
            "shape": [1],
            "data_offsets": [i, i + 1],
        }
        for i in range(20_000)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    assert measured(TARGETS["header"], len(text).to_bytes(8, "little") + text + bytes(20_000))


@pytest.mark.parametrize("name", TARGETS)
def test_every_depth(name: str) -> None:
    """Somewhere between what can be parsed and what can be written back, recursion ends."""
    for depth in range(800, 1000, 3):
        value = "[" * depth + "]" * depth
        for data in put_into(name, f'{{"a":{value}}}'):
            TARGETS[name].read(data)


def test_manifest_of_a_billion_layers() -> None:
    seed = TARGETS["manifest"].seeds()[0]
    table = json.loads(seed)
    table["contract"]["num_hidden_layers"] = 10**9
    assert not measured(TARGETS["manifest"], json.dumps(table).encode())


def test_library_disagrees_with_what_is_wrong() -> None:
    """The oracle is one: a range that is off by a byte shows."""
    good = shards()[0]
    shifted = good.replace(b"[16, 80]", b"[15, 79]")
    assert not TARGETS["header"].read(shifted)
