"""checkpoint -> bundle: plan, copy the small files, trace the graph, write the weights file by file, manifest last.

Everything happens in a directory of its own beside the bundle's place, which gets the final name when it is complete
(staging.py). Each large file is entered into a journal once it is on disk; a build that was killed goes on after the
last one (journal.py). Weights are read and converted on several threads, and written here in their order (pipeline.py).
"""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor

from glm_export.exporter.config import Glm4MoeConfig, parse_json
from glm_export.exporter.estimate import check_disk, check_memory
from glm_export.exporter.journal import Journal
from glm_export.exporter.page_cache import forget, too_large_to_stay
from glm_export.exporter.pipeline import WAITING, default_threads, in_order
from glm_export.exporter.plan import BuildPlan, PlannedFile, versions
from glm_export.exporter.progress import Advance, Reporter
from glm_export.exporter.recipe import Recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.source.companions import copy_companions
from glm_export.exporter.source.quantized import RoundingError
from glm_export.exporter.staging import Staging
from glm_export.exporter.storage import Block, Converted, convert
from glm_export.exporter.trace import trace
from glm_export.exporter.weight_file import FOLDER, Location
from glm_export.runtime.bundle import JOURNAL_NAME, MODEL_NAME, Bundle
from glm_export.runtime.errors import InputError
from glm_export.runtime.files import FileRecord, HashingWriter, write_text_durably
from glm_export.runtime.manifest import Manifest


def build(
    source: Checkpoint | Glm4MoeConfig,
    recipe: Recipe,
    out: Path,
    reporter: Reporter,
    *,
    replace: bool = False,
    threads: int | None = None,
) -> Manifest:
    """Builds a bundle at `out`.

    Args:
        source: an opened checkpoint; or only a config, for a graph without weights (to look at, not to run).
        recipe: all choices.
        out: the bundle's directory.
        reporter: where progress goes.
        replace: a bundle at `out` is replaced once the new one is complete and verified; without, `out` must not exist.
        threads: how many read and convert weights; as many as there are CPUs when None. The bundle is the same.

    Raises:
        UsageError: `out` exists and is not to be replaced.
        InputError: the checkpoint does not fit the recipe, or has weights that can not be stored.
        IntegrityError: the checkpoint changed while it was read.
        ResourceError: there is not enough memory or disk, or the disk fails.
        LockedError: another build of the same bundle is running.
    """
    plan = BuildPlan.of(source, recipe)
    threads = threads or default_threads()
    with Staging.open(out, replace=replace) as staging:
        manifest = _build(plan, staging.directory, reporter, threads)
        if staging.replace:
            with reporter.stage("verifying the new bundle", sum(r.size for r in manifest.files.values())) as advance:
                Bundle.open(staging.directory, check="full", progress=advance, threads=threads)
        staging.publish()
        # Only now: who is killed before goes on with complete files. And should this fail, the bundle is complete.
        with suppress(OSError):
            (out / JOURNAL_NAME).unlink()
    return manifest


def _build(plan: BuildPlan, directory: Path, reporter: Reporter, threads: int) -> Manifest:
    remarks = plan.checkpoint.remarks(plan.recipe.precision) if plan.checkpoint else ()
    for remark in remarks:
        reporter.note(remark)
    journal = Journal.open(directory, plan.keys(), reporter, threads=threads)
    check_memory(plan, threads)
    missing = [file for file in plan.weight_files if file.path not in journal]
    check_disk(sum(file.layout.size for file in missing), directory)
    records = _copy_small_files(plan, directory)
    stop_ids = _stop_ids(directory, plan.config)  # may refuse, so before the long part
    records[MODEL_NAME] = _write_graph(plan, directory, journal, reporter)
    records |= _write_weights(plan, directory, journal, reporter, threads)
    source: dict[str, Any] = {}
    if plan.checkpoint:
        plan.checkpoint.check_unchanged()
        source = plan.checkpoint.identity() | {"path": str(plan.checkpoint.directory.resolve())}
        source |= {"remarks": list(remarks), "rounding": _rounding(plan, journal, reporter)}
    manifest = Manifest(
        name=plan.recipe.name,
        precision=plan.recipe.precision,
        contract=plan.contract,
        recipe=plan.recipe.to_dict(),
        source=source,
        versions=versions(),
        weights=plan.checkpoint is not None,
        eos_token_ids=stop_ids,
        max_position_embeddings=plan.config.max_position_embeddings,
        capacity=min(plan.recipe.runtime.capacity, plan.config.max_position_embeddings),
        batch=plan.recipe.runtime.batch,
        files=dict(sorted(records.items())),
    )
    manifest.write(directory)
    return manifest


def _copy_small_files(plan: BuildPlan, directory: Path) -> dict[str, FileRecord]:
    # Our own rendering of config.json: it says what was built, with --layers too, and has no key that nobody read.
    text = json.dumps(plan.config.to_hf_dict(), indent=2)
    records = {"config.json": write_text_durably(directory / "config.json", text)}
    return records | copy_companions(plan.copied, directory)


def _write_graph(plan: BuildPlan, directory: Path, journal: Journal, reporter: Reporter) -> FileRecord:
    if MODEL_NAME not in journal:
        with reporter.stage(f"tracing {plan.config.num_hidden_layers} layers"):
            model = trace(plan.config, plan.recipe.precision, plan.contract)
            _point_to_weights(model, plan.locations())
            proto = ir.to_proto(model)
            _check(proto)
        with HashingWriter(directory / MODEL_NAME) as writer:
            writer.write(proto.SerializeToString(deterministic=True))
        journal.add(MODEL_NAME, writer.record)
    return journal[MODEL_NAME].record


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


def _write_weights(
    plan: BuildPlan, directory: Path, journal: Journal, reporter: Reporter, threads: int
) -> dict[str, FileRecord]:
    checkpoint, precision = plan.checkpoint, plan.recipe.precision
    if checkpoint is None:
        return {}
    (directory / FOLDER).mkdir(exist_ok=True)
    missing = [file for file in plan.weight_files if file.path not in journal]
    blocks = itertools.chain.from_iterable(file.blocks(checkpoint) for file in missing)
    drop = too_large_to_stay(plan)

    def convert_and_forget(block: Block) -> Converted:
        converted = convert(checkpoint, block, precision)
        if drop:
            forget(checkpoint, block)
        return converted

    converted = in_order(convert_and_forget, blocks, threads=threads, ahead=threads + WAITING)
    total = sum(file.layout.size for file in missing)
    with reporter.stage(f"writing {precision} weights", total) as advance, closing(converted):
        for file in missing:
            of_file = itertools.islice(converted, sum(1 for _ in file.blocks(checkpoint)))
            record, rounding = _write_file(file, directory / file.path, of_file, advance)
            journal.add(file.path, record, rounding=rounding)
    return {file.path: journal[file.path].record for file in plan.weight_files}


def _write_file(
    file: PlannedFile, path: Path, converted: Iterator[Converted], advance: Advance
) -> tuple[FileRecord, dict[str, RoundingError]]:
    """Writes a weight file from its blocks; also what quantizing once more did, by kind of parameter."""
    rounding: dict[str, RoundingError] = {}

    def stored() -> Iterator[tuple[str, Tensor]]:
        for each in converted:
            yield from each.stored
            advance(each.nbytes)
            if each.rounding:
                kind = each.block.parameter.kind
                rounding[kind] = rounding.get(kind, RoundingError()) + each.rounding

    with HashingWriter(path) as writer:
        file.layout.write(writer, stored())
    return writer.record, rounding


def _rounding(plan: BuildPlan, journal: Journal, reporter: Reporter) -> dict[str, dict[str, float]]:
    """What quantizing once more did to all weights of a kind, as relative L2."""
    total: dict[str, RoundingError] = {}
    for file in plan.weight_files:
        for kind, error in journal[file.path].rounding.items():
            total[kind] = total.get(kind, RoundingError()) + error
    for kind, error in total.items():
        reporter.note(f"Quantizing {kind} once more: relative L2 {error.overall:.2e}, worst block {error.worst:.2e}.")
    return {kind: {"overall": error.overall, "worst": error.worst} for kind, error in total.items()}


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
            f"generation_config.json: eos_token_id is {reprlib.repr(ids)}, expected token ids below "
            f"{config.vocab_size}."
        )
    return tuple(ids)
