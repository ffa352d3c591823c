from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import filelock
import onnx
import pytest

from glm_export.exporter import build as build_module
from glm_export.exporter.build import build
from glm_export.exporter.checkpoint import Checkpoint
from glm_export.exporter.progress import Reporter
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import InputError, LockedError, ResourceError, UsageError
from glm_export.runtime.generate import generate
from glm_export.runtime.open import open_session

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def traced(tiny_recipe):
    """Traces once for this file: what is tested here is what happens around the graph."""
    import onnx_ir as ir

    from glm_export.exporter.trace import trace

    cache = {}

    def cached(config, precision, contract):
        key = (config, precision, contract)
        if key not in cache:
            cache[key] = ir.to_proto(_with_placeholders(trace(config, precision, contract)))
        return _without_placeholders(ir.from_proto(cache[key]))

    # Initializers without data can not be serialized: stand-ins of no size carry them through.
    def _with_placeholders(model):
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                value.const_value = ir.ExternalTensor("none", 0, 0, value.dtype, shape=value.shape, name=name)
        return model

    def _without_placeholders(model):
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = None
        return model

    return cached


@pytest.fixture
def fast_trace(traced, monkeypatch):
    monkeypatch.setattr(build_module, "trace", traced)


def _hashes(directory: Path) -> dict[str, str]:
    return {path: record.sha256 for path, record in Bundle.open(directory).manifest.files.items()}


def test_full_check_with_the_external_data_in_place(bundle_of):
    for precision in ("fp32", "fp8"):
        onnx.checker.check_model(str(bundle_of(precision).model_path), full_check=True)


def test_the_graph_file_has_no_weights_and_no_paths_of_this_machine(bundle_of, tiny_checkpoint):
    for precision in ("bf16", "fp8"):
        data = bundle_of(precision).model_path.read_bytes()
        assert len(data) < 200_000
        for trace_of_here in (str(Path.cwd()), str(tiny_checkpoint), "site-packages", ".py"):
            assert trace_of_here.encode() not in data


def test_the_bundle_is_complete_and_verifies(bundle_of):
    bundle = bundle_of("fp8")
    assert bundle.verify()
    listed = set(bundle.manifest.files)
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.onnx"} <= listed
    weights = {
        f"weights/{g}.safetensors" for g in ("embed", "layer-000", "layer-001", "layer-002", "layer-003", "head")
    }
    assert weights <= listed
    assert not (bundle.directory / "journal.json").exists()
    assert bundle.manifest.eos_token_ids == (400, 407, 409)
    assert not list(bundle.directory.parent.glob("*.lock"))


def test_two_builds_are_byte_identical(tiny_checkpoint, tmp_path):
    recipe = load_recipe("tiny")
    for name in ("one", "two"):
        build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / name, QUIET)
    assert _hashes(tmp_path / "one") == _hashes(tmp_path / "two")


def test_an_interrupted_build_goes_on_where_it_was(tiny_checkpoint, tmp_path, fast_trace, monkeypatch):
    recipe = load_recipe("tiny")
    build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / "clean", QUIET)

    real, done = build_module.convert, []

    def failing(checkpoint, parameter, precision):
        if parameter.group == "layer-002":
            raise KeyboardInterrupt
        done.append(parameter.group)
        return real(checkpoint, parameter, precision)

    monkeypatch.setattr(build_module, "convert", failing)
    with pytest.raises(KeyboardInterrupt):
        build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()
    staging = tmp_path / "out.building"
    assert not (staging / "manifest.json").exists()
    with pytest.raises(InputError, match="did not finish"):
        Bundle.open(staging)
    kept = set(json.loads((staging / "journal.json").read_text())["files"])
    assert kept == {"weights/embed.safetensors", "weights/layer-000.safetensors", "weights/layer-001.safetensors"}

    again = []

    def recording(checkpoint, parameter, precision):
        again.append(parameter.group)
        return real(checkpoint, parameter, precision)

    monkeypatch.setattr(build_module, "convert", recording)
    build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / "out", QUIET)
    assert set(again) == {"layer-002", "layer-003", "head"}, "completed files were computed again"
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "clean")


@pytest.mark.parametrize("what", ["recipe", "damage"])
def test_a_resumed_build_trusts_nothing_that_changed(tiny_checkpoint, tmp_path, fast_trace, monkeypatch, what):
    real = build_module.convert

    def failing(checkpoint, parameter, precision):
        if parameter.group == "head":
            raise KeyboardInterrupt
        return real(checkpoint, parameter, precision)

    monkeypatch.setattr(build_module, "convert", failing)
    with pytest.raises(KeyboardInterrupt):
        build(Checkpoint.open(tiny_checkpoint), load_recipe("tiny"), tmp_path / "out", QUIET)
    if what == "damage":
        path = tmp_path / "out.building/weights/layer-001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    monkeypatch.setattr(build_module, "convert", real)
    recipe = load_recipe("tiny", {"precision": "bf16"} if what == "recipe" else {})
    build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / "out", QUIET)
    build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / "clean", QUIET)
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "clean")


def test_an_existing_directory_is_never_touched(tiny_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    with pytest.raises(UsageError, match="already exists"):
        build(Checkpoint.open(tiny_checkpoint), load_recipe("tiny"), tmp_path / "out", QUIET)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]


def test_a_second_builder_is_turned_away(tiny_checkpoint, tmp_path):
    with filelock.FileLock(tmp_path / "out.lock"), pytest.raises(LockedError, match="Another process"):
        build(Checkpoint.open(tiny_checkpoint), load_recipe("tiny"), tmp_path / "out", QUIET)


def test_a_disk_that_is_too_small_is_noticed_first(tiny_checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="free some space"):
        build(Checkpoint.open(tiny_checkpoint), load_recipe("tiny"), tmp_path / "out", QUIET)


def test_tied_embeddings_share_their_bytes_and_run(tiny_recipe, tmp_path):
    config = dataclasses.replace(tiny_recipe.model, tie_word_embeddings=True, num_hidden_layers=2)
    write_random_checkpoint(config, tmp_path / "checkpoint")
    recipe = dataclasses.replace(tiny_recipe, model=None, precision="bf16")
    build(Checkpoint.open(tmp_path / "checkpoint"), recipe, tmp_path / "bundle", QUIET)
    model = onnx.load(tmp_path / "bundle/model.onnx", load_external_data=False)
    places = {
        i.name: {e.key: e.value for e in i.external_data}
        for i in model.graph.initializer
        if i.name in ("lm_head.weight", "model.embed_tokens.weight")
    }
    assert places["lm_head.weight"] == places["model.embed_tokens.weight"]
    with open_session(Bundle.open(tmp_path / "bundle", check="full")) as session:
        assert len(generate(session, [[1, 2, 3]], max_new_tokens=4, stop_ids=())[0].tokens) == 4


def test_a_cut_checkpoint_is_the_first_layers(tiny_checkpoint, tmp_path, bundle_of):
    checkpoint = Checkpoint.open(tiny_checkpoint).with_layers(2)
    recipe = dataclasses.replace(load_recipe("tiny"), model=None)
    manifest = build(checkpoint, recipe, tmp_path / "cut", QUIET)
    assert manifest.contract.num_hidden_layers == 2
    whole = bundle_of("fp8").manifest.files
    for path in ("weights/layer-000.safetensors", "weights/layer-001.safetensors", "weights/head.safetensors"):
        assert manifest.files[path] == whole[path]
