"""What a build will do, decided before it does anything: which files, of which layout, from which source tensors.

`glm-export plan` shows a plan, `glm-export build` carries it out; there is no other way to either.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_export.exporter.config import Glm4MoeConfig, contract
from glm_export.exporter.journal import Key
from glm_export.exporter.layout import QUANTIZED, TIED, Parameter, groups
from glm_export.exporter.recipe import Recipe, check_model
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.source.companions import companions
from glm_export.exporter.storage import Block, blocks, stored_tensors
from glm_export.exporter.weight_file import FOLDER, Location, WeightFile, all_locations
from glm_export.runtime.bundle import MODEL_NAME
from glm_export.runtime.contract import Contract
from glm_export.runtime.errors import UsageError

_LIBRARIES = ("glm-export", "torch", "onnx", "onnx-ir", "onnxscript", "numpy", "ml-dtypes")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFile:
    """A weight file and the parameters it is made of."""

    layout: WeightFile
    parameters: tuple[Parameter, ...]
    source_bytes: int
    """What is read for it."""
    key: Key

    @property
    def path(self) -> str:
        """Relative to the bundle."""
        return self.layout.path

    def blocks(self, checkpoint: Checkpoint) -> Iterator[Block]:
        """The units of conversion, in the order in which they are written."""
        return (block for parameter in self.parameters for block in blocks(checkpoint, parameter))


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """All that a build depends on; make one with `of`."""

    checkpoint: Checkpoint | None
    """None for a graph without weights."""
    config: Glm4MoeConfig
    recipe: Recipe
    contract: Contract
    files: tuple[PlannedFile, ...]
    graph_key: Key
    copied: tuple[Path, ...]
    """The small files that are taken over from the checkpoint."""

    @classmethod
    def of(cls, source: Checkpoint | Glm4MoeConfig, recipe: Recipe) -> BuildPlan:
        """Plans a build.

        Args:
            source: an opened checkpoint; or only a config, for a graph without weights (to look at, not to run).
            recipe: all choices.

        Raises:
            UsageError: the precision is for a head of its own, and the model's is the embedding.
            InputError: the checkpoint does not fit the recipe, or as `companions`.
        """
        checkpoint = source if isinstance(source, Checkpoint) else None
        config = source.config if isinstance(source, Checkpoint) else source
        check_model(recipe, config)
        if config.tie_word_embeddings and "lm_head" in QUANTIZED.get(recipe.precision, ()):
            raise UsageError(
                f"precision {recipe.precision} quantizes lm_head, which this model shares with its embedding "
                "(tie_word_embeddings): use fp8."
            )
        bindings = contract(
            config,
            precision=recipe.precision,
            logits=recipe.export.logits,
            inputs_embeds=recipe.export.inputs_embeds,
            outputs=recipe.export.outputs,
        )
        program = versions()
        files = tuple(
            _planned(group, members, checkpoint, recipe.precision, program) for group, members in groups(config).items()
        )
        places = {name: dataclasses.asdict(place) for name, place in all_locations(f.layout for f in files)}
        graph_key = Key(
            recipe=_digest(recipe.precision, dataclasses.asdict(bindings), places),
            source=_digest(config.to_hf_dict()),
            program=_digest(program),
        )
        return cls(
            checkpoint=checkpoint,
            config=config,
            recipe=recipe,
            contract=bindings,
            files=files,
            graph_key=graph_key,
            copied=companions(checkpoint.directory) if checkpoint else (),
        )

    @property
    def weight_files(self) -> tuple[PlannedFile, ...]:
        """The weight files to be written: none for a graph without weights."""
        return self.files if self.checkpoint else ()

    def keys(self) -> dict[str, Key]:
        """What each file that takes long to make depends on."""
        return {MODEL_NAME: self.graph_key} | {file.path: file.key for file in self.weight_files}

    def locations(self) -> dict[str, Location]:
        """Where the graph finds the data of every initializer."""
        found = dict(all_locations(file.layout for file in self.files))
        if self.config.tie_word_embeddings:
            found |= {name: found[shared] for name, shared in TIED.items()}
        return found


def _planned(
    group: str, members: tuple[Parameter, ...], checkpoint: Checkpoint | None, precision: str, program: dict[str, str]
) -> PlannedFile:
    layout = WeightFile.plan(
        f"{FOLDER}/{group}.safetensors", (t for parameter in members for t in stored_tensors(parameter, precision))
    )
    pieces = [piece for parameter in members for piece in checkpoint.pieces(parameter)] if checkpoint else []
    stored = [t for piece in pieces for t in (piece.tensor, piece.scale) if t]
    shards = {shard.file: shard for shard in checkpoint.shards} if checkpoint else {}
    touched = [shards[file] for file in sorted({tensor.file for tensor in stored})]
    key = Key(
        recipe=_digest(layout.header.hex()),
        source=_digest(
            # No inode or device number: those of the same file may be others after a restart of the machine.
            [[shard.header_sha256, shard.stamp.size, shard.stamp.mtime_ns] for shard in touched],
            [[piece.name, str(piece.scheme)] for piece in pieces],
        ),
        program=_digest(program.get("glm-export")),
    )
    source_bytes = sum(tensor.end - tensor.start for tensor in stored)
    return PlannedFile(layout=layout, parameters=members, source_bytes=source_bytes, key=key)


def versions() -> dict[str, str]:
    """Versions of what takes part in a build; a source tree that was not installed has none of its own."""
    found = {}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
