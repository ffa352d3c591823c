"""checkpoint -> bundle: trace the graph, write the weights file by file, tie them together, write the manifest.

Everything happens in `<bundle>.building`, which gets its final name when it is complete. Each weight file is entered
into journal.json once it is on disk; a build that was killed goes on after the last one, if nothing else changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor

from glm_export.exporter.checkpoint import Checkpoint
from glm_export.exporter.config import Glm4MoeConfig, contract, parse_json
from glm_export.exporter.layout import TIED, Parameter, groups
from glm_export.exporter.lock import only_builder
from glm_export.exporter.progress import Advance, Reporter
from glm_export.exporter.recipe import Recipe, check_model
from glm_export.exporter.storage import convert, stored_tensors
from glm_export.exporter.trace import trace
from glm_export.exporter.weight_file import FOLDER, Location, WeightFile, all_locations
from glm_export.runtime.bundle import JOURNAL_NAME, MODEL_NAME
from glm_export.runtime.errors import InputError, ResourceError, UsageError
from glm_export.runtime.files import FileRecord, HashingWriter, sha256_of, sync_directory, write_text_durably
from glm_export.runtime.manifest import Manifest

COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Taken over from the checkpoint where it has them."""

_LIBRARIES = ("glm-export", "torch", "onnx", "onnx-ir", "onnxscript", "numpy", "ml-dtypes")


def build(source: Checkpoint | Glm4MoeConfig, recipe: Recipe, out: Path, reporter: Reporter) -> Manifest:
    """Builds a bundle at `out`.

    Args:
        source: an opened checkpoint; or only a config, for a graph without weights (to look at, not to run).
        recipe: all choices.
        out: the bundle's directory, which must not exist.
        reporter: where progress goes.

    Raises:
        UsageError: `out` exists.
        InputError: the checkpoint does not fit the recipe, or has weights that can not be stored.
        ResourceError: the disk is too small.
        LockedError: another build of the same bundle is running.
    """
    if out.exists():
        raise UsageError(f"{out} already exists; remove it or choose another place for the bundle.")
    check_model(recipe, source.config if isinstance(source, Checkpoint) else source)
    staging = out.with_name(out.name + ".building")
    staging.parent.mkdir(parents=True, exist_ok=True)
    with only_builder(out):
        manifest = _build(source, recipe, staging, reporter)
        staging.rename(out)
        sync_directory(out.parent)
    return manifest


def _build(source: Checkpoint | Glm4MoeConfig, recipe: Recipe, staging: Path, reporter: Reporter) -> Manifest:
    checkpoint = source if isinstance(source, Checkpoint) else None
    config = source.config if isinstance(source, Checkpoint) else source
    parameters_of = groups(config)
    files = {
        group: WeightFile.plan(group, (t for p in members for t in stored_tensors(p, recipe.precision)))
        for group, members in parameters_of.items()
    }
    bindings = contract(
        config,
        precision=recipe.precision,
        logits=recipe.export.logits,
        inputs_embeds=recipe.export.inputs_embeds,
        outputs=recipe.export.outputs,
    )
    identity = checkpoint.identity() | {"path": str(checkpoint.directory.resolve())} if checkpoint else {}
    journal = Journal.open(staging, _key(recipe, config, identity))
    if checkpoint:
        _check_space(staging, [file for file in files.values() if file.path not in journal.files])

    records = _copy_small_files(checkpoint, config, staging)
    stop_ids = _stop_ids(staging, config)  # may refuse, so before the long part
    with reporter.stage(f"tracing {config.num_hidden_layers} layers"):
        model = trace(config, recipe.precision, bindings)
    if checkpoint:
        total = sum(file.size for file in files.values())
        with reporter.stage(f"writing {recipe.precision} weights", total) as advance:
            for group, members in parameters_of.items():
                records[files[group].path] = _write_weights(
                    checkpoint, members, files[group], recipe.precision, journal, advance
                )
    with reporter.stage("writing the graph"):
        locations = dict(all_locations(files.values()))
        if config.tie_word_embeddings:
            locations |= {name: locations[shared] for name, shared in TIED.items()}
        _point_to_weights(model, locations)
        records[MODEL_NAME] = _write_model(model, staging)

    manifest = Manifest(
        name=recipe.name,
        precision=recipe.precision,
        contract=bindings,
        recipe=recipe.to_dict(),
        source=identity,
        versions=_versions(),
        weights=checkpoint is not None,
        eos_token_ids=stop_ids,
        max_position_embeddings=config.max_position_embeddings,
        capacity=min(recipe.runtime.capacity, config.max_position_embeddings),
        batch=recipe.runtime.batch,
        files=dict(sorted(records.items())),
    )
    manifest.write(staging)
    journal.remove()
    return manifest


class Journal:
    """Which weight files of an unfinished build are complete; valid for one combination of recipe and source."""

    def __init__(self, directory: Path, key: str, files: dict[str, FileRecord]) -> None:
        self._path = directory / JOURNAL_NAME
        self._key = key
        self.files = files

    @classmethod
    def open(cls, directory: Path, key: str) -> Journal:
        """Continues the build in `directory` if it is the same one, else starts afresh there."""
        try:
            seen = parse_json((directory / JOURNAL_NAME).read_bytes(), JOURNAL_NAME)
            files = {path: FileRecord(**record) for path, record in seen["files"].items()} if seen["key"] == key else {}
        except (OSError, InputError, KeyError, TypeError, AttributeError):
            files = {}
        files = {path: record for path, record in files.items() if _is_still(directory / path, record)}
        if not files:
            shutil.rmtree(directory, ignore_errors=True)
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        journal = cls(directory, key, files)
        journal._write()
        return journal

    def place(self, path: str) -> Path:
        """Where a file of the bundle is built."""
        return self._path.parent / path

    def add(self, path: str, record: FileRecord) -> None:
        """Notes a file that is on disk under its final name."""
        self.files[path] = record
        self._write()

    def remove(self) -> None:
        """Ends the build."""
        self._path.unlink()

    def _write(self) -> None:
        files = {path: {"size": record.size, "sha256": record.sha256} for path, record in self.files.items()}
        write_text_durably(self._path, json.dumps({"key": self._key, "files": files}, indent=1))


def _is_still(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size and sha256_of(path) == record.sha256


def _key(recipe: Recipe, config: Glm4MoeConfig, identity: Mapping[str, Any]) -> str:
    """Identifies a build: its choices, its source and the program."""
    version = _versions().get("glm-export", "")
    text = json.dumps([recipe.to_dict(), config.to_hf_dict(), identity, version], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    """Versions of what takes part in a build; a source tree that was not installed has none of its own."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _check_space(staging: Path, missing: Iterable[WeightFile]) -> None:
    needed = sum(file.size for file in missing)
    free = shutil.disk_usage(staging).free
    if needed > free:
        raise ResourceError(
            f"The weights need {needed / 1e9:.1f} GB and {staging.parent} has {free / 1e9:.1f} GB free; "
            "free some space or build elsewhere."
        )


def _write_weights(
    checkpoint: Checkpoint,
    members: Iterable[Parameter],
    file: WeightFile,
    precision: str,
    journal: Journal,
    advance: Advance,
) -> FileRecord:
    if file.path not in journal.files:

        def pieces() -> Iterable[tuple[str, Tensor]]:
            for parameter in members:
                for name, block in convert(checkpoint, parameter, precision):
                    yield name, block
                    advance(block.nbytes)

        with HashingWriter(journal.place(file.path)) as writer:
            file.write(writer, pieces())
        journal.add(file.path, writer.record)
    else:
        advance(file.size)
    return journal.files[file.path]


def _point_to_weights(model: ir.Model, locations: Mapping[str, Location]) -> None:
    """Turns the initializers without data into external data in the weight files."""
    used = set()
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue  # a constant of a few bytes
        assert value.dtype is not None
        assert value.shape is not None
        location = locations[name]
        value.const_value = ir.ExternalTensor(
            location.path, location.offset, location.length, value.dtype, shape=value.shape, name=name
        )
        used.add(name)
    # Without token ids as input, nobody looks embeddings up.
    assert locations.keys() - used <= {"model.embed_tokens.weight"}, locations.keys() - used


def _write_model(model: ir.Model, staging: Path) -> FileRecord:
    proto = ir.to_proto(model)
    _check(proto)
    with HashingWriter(staging / MODEL_NAME) as writer:
        writer.write(proto.SerializeToString(deterministic=True))
    return writer.record


def _check(proto: onnx.ModelProto) -> None:
    """The full ONNX check, with the weights as inputs: the checker would read them all into memory."""
    checked = onnx.ModelProto()
    checked.CopyFrom(proto)
    initializers = list(checked.graph.initializer)
    del checked.graph.initializer[:]
    for tensor in initializers:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            checked.graph.input.append(value)
        else:
            checked.graph.initializer.append(tensor)
    onnx.checker.check_model(checked, full_check=True)


def _copy_small_files(checkpoint: Checkpoint | None, config: Glm4MoeConfig, staging: Path) -> dict[str, FileRecord]:
    # Our own rendering of config.json: it says what was built, with --layers too, and has no key that nobody read.
    records = {"config.json": write_text_durably(staging / "config.json", json.dumps(config.to_hf_dict(), indent=2))}
    for name in COPIED:
        if checkpoint and (checkpoint.directory / name).is_file():
            with HashingWriter(staging / name) as writer:
                writer.write((checkpoint.directory / name).read_bytes())
            records[name] = writer.record
    return records


def _stop_ids(staging: Path, config: Glm4MoeConfig) -> tuple[int, ...]:
    """generation_config.json has the last word on what ends a generation, config.json the first."""
    path = staging / "generation_config.json"
    if not path.exists():
        return config.eos_token_id
    ids = parse_json(path.read_bytes(), path.name).get("eos_token_id")
    ids = [ids] if isinstance(ids, int) else ids
    if ids is None:
        return config.eos_token_id
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
        raise InputError(
            f"generation_config.json: eos_token_id is {ids}, expected token ids below {config.vocab_size}."
        )
    return tuple(ids)
