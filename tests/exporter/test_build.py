from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import filelock
import onnx
import pytest

from glm_export.exporter import build as build_module
from glm_export.exporter import staging as staging_module
from glm_export.exporter.build import build
from glm_export.exporter.layout import parameters
from glm_export.exporter.plan import BuildPlan
from glm_export.exporter.progress import Reporter
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.staging import Staging
from glm_export.exporter.storage import convert
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import InputError, IntegrityError, LockedError, ResourceError, UsageError
from glm_export.runtime.generate import generate
from glm_export.runtime.manifest import Manifest
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


class Builder:
    """Builds the tiny model and counts what is converted."""

    def __init__(self, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checkpoint, self.folder, self.monkeypatch = checkpoint, folder, monkeypatch
        self.converted: set[str] = set()
        self.notes: list[str] = []

    def build(self, name: str = "out", *, stop_at: str | None = None, settings=None, **options):
        self.converted.clear()
        self.notes.clear()

        def recording(checkpoint, block, precision):
            if block.parameter.group == stop_at:
                raise KeyboardInterrupt
            self.converted.add(block.parameter.group)
            return convert(checkpoint, block, precision)

        reporter = Reporter(quiet=True)
        self.monkeypatch.setattr(reporter, "note", self.notes.append)
        self.monkeypatch.setattr(build_module, "convert", recording)
        recipe = load_recipe("tiny", settings or {})
        return build(Checkpoint.open(self.checkpoint), recipe, self.folder / name, reporter, **options)

    def stop(self, at: str = "head", **options) -> Path:
        with pytest.raises(KeyboardInterrupt):
            self.build(stop_at=at, **options)
        assert not (self.folder / "out").exists()
        (staging,) = self.left()
        return staging

    def left(self) -> list[Path]:
        return sorted(self.folder.glob("out.*"))

    def hashes(self, name: str = "out") -> dict[str, str]:
        assert self.left() == []
        return _hashes(self.folder / name)


@pytest.fixture
def builder(tiny_checkpoint, tmp_path, fast_trace, monkeypatch) -> Builder:
    # A copy of its own: some tests change it.
    return Builder(Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")), tmp_path, monkeypatch)


GROUPS = ("embed", "layer-000", "layer-001", "layer-002", "layer-003", "head")


def test_an_interrupted_build_goes_on_where_it_was(builder):
    builder.build("clean")
    staging = builder.stop("layer-002")
    assert not (staging / "manifest.json").exists()
    with pytest.raises(InputError, match="did not finish"):
        Bundle.open(staging)
    complete = {"model.onnx", *(f"weights/{group}.safetensors" for group in GROUPS[:3])}
    assert set(json.loads((staging / "journal.json").read_text())["files"]) == complete
    assert {path.relative_to(staging).as_posix() for path in staging.glob("weights/*")} == complete - {"model.onnx"}

    builder.monkeypatch.setattr(build_module, "trace", None)
    builder.build()
    assert builder.converted == {"layer-002", "layer-003", "head"}, "completed files were computed again"
    assert "going on with 4 complete files of 7" in builder.notes
    assert builder.hashes() == _hashes(builder.folder / "clean")


def test_nothing_is_computed_again_between_the_last_file_and_the_final_name(builder, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            builder.build()
    builder.build()
    assert builder.converted == set()
    assert Bundle.open(builder.folder / "out").verify()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_byte(builder, bundle_of, threads):
    builder.build(threads=threads)
    want = {path: record.sha256 for path, record in bundle_of("fp8").manifest.files.items()}
    assert builder.hashes() == want


@pytest.mark.parametrize(
    ("setting", "value", "again", "trace_again"),
    [
        ("runtime.capacity", 64, {"head"}, False),
        ("export.logits", "all", {"head"}, True),
        ("precision", "bf16", {*GROUPS} - {"embed"}, True),  # which is bfloat16 in both
    ],
)
def test_a_changed_recipe_invalidates_what_depends_on_it(builder, traced, setting, value, again, trace_again):
    builder.stop("head")
    traces = []
    builder.monkeypatch.setattr(build_module, "trace", lambda *args: traces.append(args) or traced(*args))
    builder.build(settings={setting: value})
    assert builder.converted == again
    assert bool(traces) == trace_again
    assert any("because the recipe changed" in note for note in builder.notes) == trace_again
    got = builder.hashes()
    builder.build("clean", settings={setting: value})
    assert got == _hashes(builder.folder / "clean")


def test_a_changed_shard_invalidates_the_files_made_from_it(builder):
    builder.stop("head")
    checkpoint = Checkpoint.open(builder.checkpoint)
    found = parameters(checkpoint.config).values()
    files = {
        group: {p.tensor.file for q in found if q.group == group for p in checkpoint.pieces(q)} for group in GROUPS
    }
    (changed, *_) = files["layer-002"]
    path = builder.checkpoint / changed
    data = bytearray(path.read_bytes())
    data[-2:] = b"\0\0"
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    builder.build()
    assert builder.converted == {group for group in GROUPS if changed in files[group]} | {"head"}
    assert len(builder.converted) < len(GROUPS)
    assert any("because the checkpoint changed" in note for note in builder.notes)
    got = builder.hashes()
    builder.build("clean")
    assert got == _hashes(builder.folder / "clean")


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_complete_file_is_written_again(builder, how):
    builder.build("clean")
    staging = builder.stop("head")
    path = staging / "weights/layer-001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    if how != "remove":
        path.write_bytes(data if how == "flip" else data[:-1])
    builder.build()
    assert builder.converted == {"layer-001", "head"}
    assert any("the file is damaged" in note for note in builder.notes)
    assert builder.hashes() == _hashes(builder.folder / "clean")


@pytest.mark.parametrize("journal", ["", "[]", '{"files": []}', '{"files": {"../x": {}}}', '{"files": {"a": 1}}'])
def test_a_journal_that_is_none_starts_afresh(builder, journal):
    staging = builder.stop("layer-001")
    (staging / "journal.json").write_text(journal)
    (staging / "weights/sub").mkdir()
    (staging / "weights/sub/left.tmp").write_text("x")
    builder.build()
    assert builder.converted == set(GROUPS)
    assert Bundle.open(builder.folder / "out").verify()


def test_a_source_that_changes_under_the_build_makes_no_bundle(builder):
    class Meddling(Reporter):
        def stage(self, title, total_bytes=None):
            if title.startswith("writing"):
                os.utime(next(builder.checkpoint.glob("*.safetensors")), ns=(1, 1))
            return super().stage(title, total_bytes)

    with pytest.raises(IntegrityError, match="written to while it was being read"):
        build(Checkpoint.open(builder.checkpoint), load_recipe("tiny"), builder.folder / "out", Meddling(quiet=True))
    assert not (builder.folder / "out").exists()


def test_a_large_source_is_dropped_from_the_page_cache(builder, monkeypatch):
    dropped, advise = {}, os.posix_fadvise

    def recording(descriptor, start, length, advice):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        dropped[name] = dropped.get(name, 0) + length * (advice == os.POSIX_FADV_DONTNEED)
        return advise(descriptor, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", recording)
    builder.build("small")
    assert not [name for name in dropped if name.startswith("model-")]
    monkeypatch.setattr(build_module, "too_large_to_stay", lambda _: True)
    builder.build("large")
    checkpoint = Checkpoint.open(builder.checkpoint)
    want: dict[str, int] = {}
    for parameter in parameters(checkpoint.config).values():
        for piece in checkpoint.pieces(parameter):
            want[piece.tensor.file] = want.get(piece.tensor.file, 0) + piece.tensor.nbytes
    assert {name: length for name, length in dropped.items() if name.startswith("model-")} == want


def test_an_existing_directory_is_never_touched(builder):
    (builder.folder / "out").mkdir()
    (builder.folder / "out/precious").write_text("x")
    with pytest.raises(UsageError, match="already exists"):
        builder.build()
    with pytest.raises(UsageError, match="only a bundle is replaced"):
        builder.build(replace=True)
    assert sorted(p.name for p in builder.folder.glob("out*/**/*")) == ["precious"]


def test_replace_keeps_the_old_bundle_until_the_new_one_verifies(builder, monkeypatch):
    builder.build(settings={"precision": "bf16"})
    before = builder.hashes()
    with pytest.raises(KeyboardInterrupt):
        builder.build(replace=True, stop_at="head")
    assert _hashes(builder.folder / "out") == before

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", _write_and_damage(Manifest.write))
        with pytest.raises(IntegrityError, match="has sha256"):
            builder.build(replace=True)
    assert _hashes(builder.folder / "out") == before

    builder.build(replace=True)
    assert Bundle.open(builder.folder / "out").manifest.precision == "fp8"
    assert builder.left() == []


def _write_and_damage(write):
    def damaging(manifest, directory):
        path = directory / "weights/layer-001.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return write(manifest, directory)

    return damaging


def test_replace_on_a_file_system_that_can_not_exchange_names(builder, monkeypatch):
    builder.build(settings={"precision": "bf16"})
    before = builder.hashes()
    monkeypatch.setattr(staging_module, "_exchange", lambda *_: False)
    rename, calls = Path.rename, []

    def killed_between(path, target):
        calls.append(target)
        if len(calls) == 3:  # the claim of a directory is none; old aside, then new into place
            raise KeyboardInterrupt
        return rename(path, target)

    calls.append(None)
    monkeypatch.setattr(Path, "rename", killed_between)
    with pytest.raises(KeyboardInterrupt):
        builder.build(replace=True)
    assert not (builder.folder / "out").exists()
    monkeypatch.setattr(Path, "rename", rename)
    # The next build gives the old bundle its name back before anything else.
    with pytest.raises(UsageError, match="already exists"):
        builder.build()
    assert _hashes(builder.folder / "out") == before
    builder.build(replace=True)
    assert builder.converted == set()
    assert Bundle.open(builder.folder / "out").manifest.precision == "fp8"
    assert builder.left() == []


def test_a_second_builder_is_turned_away(builder):
    with filelock.FileLock(builder.folder / "out.lock"), pytest.raises(LockedError, match="Another process"):
        builder.build()


def test_two_builders_never_share_a_directory_even_without_a_lock(builder, monkeypatch):
    # On some network file systems every lock succeeds. A second builder that comes in the middle takes over.
    monkeypatch.setattr(staging_module, "only_builder", lambda _: contextlib.nullcontext())
    second = Builder(builder.checkpoint, builder.folder, monkeypatch)
    begun = []

    def barging_in(checkpoint, block, precision):
        if block.parameter.group == "layer-002" and not begun:
            begun.append(True)
            build(Checkpoint.open(second.checkpoint), load_recipe("tiny"), second.folder / "out", QUIET)
        return convert(checkpoint, block, precision)

    monkeypatch.setattr(build_module, "convert", barging_in)
    with pytest.raises(LockedError, match="took over the build"):
        build(Checkpoint.open(builder.checkpoint), load_recipe("tiny"), builder.folder / "out", QUIET, threads=1)
    assert Bundle.open(builder.folder / "out").verify()
    assert builder.left() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_failing_disk_is_a_resource_error(builder, monkeypatch, call, code):
    def fail(*_args, **_options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, call)), fail)
        with pytest.raises(ResourceError, match="run the same command again"):
            builder.build()
    builder.build()
    assert Bundle.open(builder.folder / "out").verify()


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


def test_a_head_that_is_the_embedding_can_not_be_fp8(tiny_recipe):
    config = dataclasses.replace(tiny_recipe.model, tie_word_embeddings=True)
    recipe = dataclasses.replace(tiny_recipe, model=None, precision="fp8-head")
    with pytest.raises(UsageError, match=r"which this model shares with its embedding .*: use fp8"):
        BuildPlan.of(config, recipe)


def test_an_fp8_head_takes_a_byte_per_weight(tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    plain, quantized = (
        BuildPlan.of(checkpoint, load_recipe("tiny", {"precision": precision})).locations()
        for precision in ("fp8", "fp8-head")
    )
    V, D = checkpoint.config.vocab_size, checkpoint.config.hidden_size
    assert plain["lm_head.weight"].length == 2 * V * D
    assert quantized["lm_head.weight"].length == V * D
    assert quantized["lm_head.weight_scale"].length == 4 * V
    assert quantized.keys() - plain.keys() == {"lm_head.weight_scale"}
    assert all(quantized[name].length == plain[name].length for name in plain if name != "lm_head.weight")


def test_a_cut_checkpoint_is_the_first_layers(tiny_checkpoint, tmp_path, bundle_of):
    checkpoint = Checkpoint.open(tiny_checkpoint).with_layers(2)
    recipe = dataclasses.replace(load_recipe("tiny"), model=None)
    manifest = build(checkpoint, recipe, tmp_path / "cut", QUIET)
    assert manifest.contract.num_hidden_layers == 2
    whole = bundle_of("fp8").manifest.files
    for path in ("weights/layer-000.safetensors", "weights/layer-001.safetensors", "weights/head.safetensors"):
        assert manifest.files[path] == whole[path]
