"""`glm-export bench`: what it counts, against the graph, the config and each other."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
from cli_tools import bundle, call, refused

from glm_export.exporter.bench import Plan
from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.inspect import inspect_bundle
from glm_export.exporter.machine import Resident
from glm_export.exporter.needs import _weight_sizes
from glm_export.plugins.library import CPU_VARIABLE, PORTABLE
from glm_export.runtime.bundle import Bundle

OPTIONS = (
    *("--prefill", "8,40", "--context", "30,16", "--batch", "1,3", "--repeats", "2", "--threads", "2"),
    *("--trust-size", "--quiet"),
)
E, K, MOE_LAYERS, LAYERS, H, A, V = 8, 3, 3, 4, 4, 16, 512  # of the tiny recipe
STEPS = 16
MIDDLES = [16 + STEPS * 1 + 7, 16 + STEPS * 2 + 7]
"""Tokens in the cache at the middle step of the two runs after a warm-up of as many steps."""


@functools.cache
def found(precision: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        called = call("bench", bundle(precision), *OPTIONS, "--json", "-o", file)
        assert called.code == 0, called
        report: dict[str, Any] = json.loads(called.out)
        assert json.loads(file.read_text()) == report
    return report


def measured(report: dict[str, Any], what: str, length: int, batch: int = 1) -> dict[str, Any]:
    wanted = {"what": what, "length": length, "batch": batch}
    (one,) = (each for each in report["measurements"] if each | wanted == each)
    return one


def spreads(one: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: value for name, value in one.items() if isinstance(value, dict)}


@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_figures_agree_with_each_other(precision: str) -> None:
    report = found(precision)
    assert [(each["what"], each["length"], each["batch"]) for each in report["measurements"]] == [
        *(("prefill", 8, 1), ("prefill", 40, 1)),
        *(("decode", 16, 1), ("decode", 30, 1), ("decode", 16, 3)),
    ]
    for one in report["measurements"]:
        for name, spread in spreads(one).items():
            assert 0 < spread["min"] <= spread["median"] <= spread["max"], (one, name)
        tokens = one["batch"] * (one["length"] if one["what"] == "prefill" else 1)
        fastest = one["tokens_per_second"]["max"]
        assert fastest == pytest.approx(tokens / one["milliseconds"]["min"] * 1e3)
        assert one["roofline_share"]["max"] >= max(one["bandwidth_share"]["max"], one["flops_share"]["max"])
        memory_bound = one["bandwidth_share"]["median"] > one["flops_share"]["median"]
        assert one["bound_by"] == ("memory" if memory_bound else "arithmetic")
        # Bytes, rates and time of a run give its share; medians of each give it as far as the runs are alike.
        assert one["bandwidth_share"]["max"] >= (
            one["bytes_per_token"]["min"] * tokens / one["bandwidth"]["max"] / one["milliseconds"]["max"] * 1e3
        )
        decodes = one["what"] == "decode"
        assert (one["python_microseconds"] is not None) == decodes
        assert (one["outside_kernels_microseconds"] is not None) == decodes
        if decodes:
            assert one["outside_kernels_microseconds"]["median"] < one["milliseconds"]["median"] * 1e3
    assert len(report["bandwidths"]) == 4
    assert all(rate > 0 for rate in report["bandwidths"].values())
    assert report["arithmetic"] in (("float32",) if precision == "fp32" else ("float32", "bfloat16"))
    opening = report["opening"]
    assert opening["first_token_seconds"] == opening["open_seconds"] + opening["prompt_seconds"] > 0
    memory = report["memory"]
    assert memory["weight_bytes"] == sum(path.stat().st_size for path in (bundle(precision) / "weights").iterdir())
    peaks = [memory[stage]["peak"] for stage in ("before", "opened", "prompted", "decoded")]
    assert peaks == sorted(peaks)
    assert memory["peak_ratio"] == peaks[-1] / (memory["weight_bytes"] + memory["cache_bytes"])


@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_a_token_needs_what_graph_and_config_say(precision: str) -> None:
    report, inspected = found(precision), inspect_bundle(Bundle.open(bundle(precision)))
    graph = onnx.load(bundle(precision) / "model.onnx", load_external_data=False).graph
    stored = {
        tensor.name: (int(place["length"]), math.prod(tensor.dims), len(tensor.dims))
        for tensor in graph.initializer
        if (place := {entry.key: entry.value for entry in tensor.external_data})
    }
    experts = {name for name in stored if ".mlp.experts." in name}
    read = stored.keys() - experts - {"model.embed_tokens.weight"}
    expert_bytes = sum(stored[name][0] for name in experts) / (E * MOE_LAYERS)
    row = stored["model.embed_tokens.weight"][0] // V
    common = sum(stored[name][0] for name in read)
    cache = inspected["kv_bytes_per_token"]
    one = measured(report, "decode", 16)
    assert one["experts_per_layer"] == {"median": K, "min": K, "max": K}
    for extreme, held in (("min", MIDDLES[0]), ("max", MIDDLES[1])):
        # All held tokens and the new one are read, the new one is written.
        expected = common + K * MOE_LAYERS * expert_bytes + row + cache * (held + 1 + 1)
        assert one["bytes_per_token"][extreme] == expected
        products = sum(stored[name][1] for name in read if stored[name][2] == 2 and not name.endswith("_scale"))
        routed = sum(stored[name][1] for name in experts if not name.endswith("_scale")) * K // E
        assert one["flops_per_token"][extreme] == 2 * (products + routed) + 4 * H * A * LAYERS * (held + 1)

    several = measured(report, "decode", 16, batch=3)
    assert K <= several["experts_per_layer"]["min"] <= several["experts_per_layer"]["max"] <= min(E, 3 * K)
    for extreme, held in (("min", MIDDLES[0]), ("max", MIDDLES[1])):
        fixed = common + 3 * row + cache * 3 * (held + 1 + 1)
        least, most = (several["experts_per_layer"][side] * MOE_LAYERS * expert_bytes for side in ("min", "max"))
        assert fixed + least <= several["bytes_per_token"][extreme] * 3 * (1 + 1e-12)
        assert several["bytes_per_token"][extreme] * 3 <= (fixed + most) * (1 + 1e-12)

    whole = measured(report, "prefill", 40)
    assert whole["bytes_per_token"]["median"] * 40 == pytest.approx(
        common + whole["experts_per_layer"]["median"] * MOE_LAYERS * expert_bytes + 40 * row + cache * 80
    )
    head = 2 * V * 64
    token = 2 * (products + routed) - head
    assert whole["flops_per_token"]["median"] * 40 == token * 40 + head + 4 * H * A * LAYERS * (40 * 41 // 2)


def test_a_tied_head_is_read_as_a_whole() -> None:
    opened = Bundle.open(bundle("fp32"))
    config = Glm4MoeConfig.from_file(opened.file("config.json"))
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    # The head's own tensor is none of the model then; the embedding, of the same size, is read in its place.
    assert _weight_sizes(opened, tied) == _weight_sizes(opened, config)


def test_without_our_kernels_nothing_is_claimed_that_nobody_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_VARIABLE, PORTABLE)
    called = call("bench", bundle("fp32"), "--prefill", 4, "--context", 4, "--batch", "1,2", "--repeats", 1, "--json")
    assert called.code == 0, called
    report = json.loads(called.out)
    assert report["kernels"] is None
    for one in report["measurements"]:
        assert one["outside_kernels_microseconds"] is None
        counted = one["what"] == "decode" and one["batch"] == 1  # a single token chooses so many, whoever computes
        assert (one["experts_per_layer"] is not None) == counted
        assert (one["roofline_share"] is not None) == counted
        assert one["bandwidth"]["median"] > 0


def test_the_table() -> None:
    called = call("bench", bundle("fp32"), *OPTIONS)
    assert called.code == 0, called
    assert called.err == ""
    lines = called.out.splitlines()
    assert [line.split()[:4] for line in lines[6:]] == [
        *(["prefill", "8", "x", "1"], ["prefill", "40", "x", "1"]),
        *(["decode", "16", "x", "1"], ["decode", "30", "x", "1"], ["decode", "16", "x", "3"]),
    ]
    assert all(len(line.split()) == len(lines[6].split()) for line in lines[6:9])


def test_what_fits_is_chosen() -> None:
    opened = Bundle.open(bundle("fp32"))  # of 1024 positions
    choose = functools.partial(Plan.of, opened, "onnxruntime", batches=None)
    plan = choose(lengths=None, contexts=None, repeats=5, capacity=None)
    assert (plan.lengths, plan.contexts, plan.batches, plan.capacity) == ((128, 512), (128,), (1, 8), 512)
    plan = choose(lengths=None, contexts=None, repeats=1, capacity=150)
    assert (plan.lengths, plan.contexts, plan.capacity) == ((128,), (), 128)
    plan = choose(lengths=(), contexts=(100, 7), repeats=1, capacity=None)
    assert (plan.lengths, plan.contexts, plan.capacity) == ((), (7, 100), 132)


@pytest.mark.parametrize(
    ("code", "arguments", "sentence"),
    [
        (2, ("--prefill", "0"), "--prefill is '0': expected numbers of 1 or more"),
        (2, ("--context", "5,-1"), "--context is '5,-1': expected numbers of 1 or more"),
        (2, ("--batch", ""), "--batch is '': expected numbers of 1 or more"),
        (2, ("--batch", "a"), "'a' is not a list of integers"),
        (2, ("--repeats", "0"), "Invalid value for '--repeats'"),
        (
            2,
            ("--context", "1000"),
            "need room for 1096 tokens per row, 96 of them for steps, and there is room for 1024",
        ),
        (2, ("--prefill", "90", "--capacity", "80"), "need room for 90 tokens per row"),
        (2, ("--batch", "70000", "--prefill", "1"), "batch is 70000: it must be 1..65536."),
        (2, ("--target", "onnxruntim"), "'onnxruntim' is not one of"),
        (3, ("--target", "tensorrt-rtx"), "tensorrt-rtx"),
        (3, ("-o", "nowhere/figures.json"), "nowhere is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused(code: int, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(code, "bench", bundle("fp32"), *arguments, "--quiet")


def test_resident_memory_is_seen() -> None:
    before = Resident.now()
    held = bytearray(b"x" * (64 << 20))
    after = Resident.now()
    assert after.anonymous - before.anonymous > 60 << 20
    assert after.peak >= after.anonymous
    assert len(held) == 64 << 20
