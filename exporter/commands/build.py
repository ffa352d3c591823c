"""`glm-export build`: checkpoint -> bundle."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from glm_export.exporter.commands.options import (
    COUNT,
    DEFAULT_TARGET,
    PATH,
    CommaSeparated,
    capabilities,
    json_option,
    print_json,
    quiet_option,
    size,
    sm_option,
    threads_option,
)
from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.recipe import PRECISIONS, TARGETS, Recipe, load_recipe, parse_setting
from glm_export.runtime.errors import UsageError

if TYPE_CHECKING:
    from glm_export.exporter.progress import Reporter
    from glm_export.exporter.source.checkpoint import Checkpoint
    from glm_export.runtime.manifest import Manifest

Command = TypeVar("Command", bound=Callable[..., Any])

_RECIPE_KEYS = {
    "precision": "precision",
    "target": "target",
    "capacity": "runtime.capacity",
    "max_batch": "runtime.batch",
    "logits": "export.logits",
    "outputs": "export.outputs",
    "inputs_embeds": "export.inputs_embeds",
}
"""Option -> the recipe's key that it overrides."""


def choices(command: Command) -> Command:
    """Gives a command the argument and options that say what is built."""
    options: tuple[Callable[[Command], Command], ...] = (
        click.argument("checkpoint", metavar="[CKPT]", required=False, type=PATH),
        click.option("--recipe", "recipe_name", metavar="R", help="A built-in recipe or a .toml file."),
        click.option("-p", "--precision", type=click.Choice(PRECISIONS), help="Of weights and activations."),
        click.option("--target", type=click.Choice(TARGETS), help="What the engine is for."),
        sm_option,
        click.option("--capacity", type=COUNT, metavar="C", help="Tokens per row of the KV cache."),
        click.option("--max-batch", type=COUNT, metavar="B", help="Rows of the KV cache."),
        click.option("--layers", type=COUNT, metavar="N", help="Keep only the first N layers."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key: validate.steps=8."),
        click.option(
            "--logits", type=click.Choice(("last", "all")), help="Of each row's last token, or of all tokens."
        ),
        click.option(
            "--outputs", type=CommaSeparated(str), metavar="A,B", help="hidden_states,router_logits,attentions"
        ),
        click.option("--inputs-embeds", is_flag=True, default=None, help="Take embeddings instead of token ids."),
        click.option(
            "--no-weights", is_flag=True, help="Only the graph, from CKPT/config.json or the recipe's [model]."
        ),
        click.option(
            "--ignore-config-key", "ignored", multiple=True, metavar="K", help="Accept this key of config.json."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@choices
@click.option("-o", "--output", "out", type=PATH, required=True, metavar="OUT", help="Where the bundle goes.")
@click.option("--replace", is_flag=True, help="Replace a bundle at OUT, once the new one is complete and verified.")
@threads_option
@quiet_option
@json_option
def build(out: Path, replace: bool, threads: int | None, quiet: bool, as_json: bool, **chosen: Any) -> None:
    """Build a bundle from a checkpoint.

    CKPT is a directory with config.json and safetensors files, OUT the bundle to make. A build that was stopped goes on
    where it was when the same command runs again. The targets tensorrt and tensorrt-rtx get their engine after that;
    `glm-export engine` adds one to a bundle that is there.
    """
    started = time.monotonic()
    source, recipe = what_to_build(**chosen)
    has_engine = recipe.target != DEFAULT_TARGET
    if has_engine:
        _check_engine(recipe, no_weights=chosen["no_weights"])

    from glm_export.exporter.build import build
    from glm_export.exporter.progress import Reporter

    reporter = Reporter(quiet=quiet)
    manifest = build(source, recipe, out, reporter, replace=replace, threads=threads)
    if has_engine:
        manifest = _build_engine(out, recipe, reporter)
    result: dict[str, Any] = {
        "path": str(out),
        "precision": manifest.precision,
        "bytes": sum(record.size for record in manifest.files.values()),
        "files": len(manifest.files),
        "engines": list(manifest.engines),
        "seconds": round(time.monotonic() - started, 3),
    }
    if as_json:
        print_json(result)
    else:
        total = size(result["bytes"])
        click.echo(f"{out}: {manifest.precision}, {total} in {result['files']} files, {result['seconds']:.1f} s")


def what_to_build(
    *,
    checkpoint: Path | None,
    recipe_name: str | None,
    sm: tuple[str, ...] | None,
    layers: int | None,
    settings: tuple[str, ...],
    no_weights: bool,
    ignored: tuple[str, ...],
    **flags: Any,
) -> tuple[Checkpoint | Glm4MoeConfig, Recipe]:
    """The source and the recipe that the options of `choices` stand for."""
    overrides = dict(map(parse_setting, settings))
    overrides |= {_RECIPE_KEYS[flag]: value for flag, value in flags.items() if value is not None}
    name = checkpoint.resolve().name if checkpoint else "model"
    recipe = load_recipe(recipe_name, overrides) if recipe_name else _default_recipe(name, overrides)
    if sm is not None:
        capable = capabilities(sm, recipe.target)
        recipe = dataclasses.replace(recipe, engine=dataclasses.replace(recipe.engine, compute_capabilities=capable))
    source = _source(checkpoint, recipe, no_weights=no_weights, ignored=ignored)
    if layers is not None:
        source = source.with_layers(layers)
        # What is built is then another architecture, and the manifest says so.
        recipe = dataclasses.replace(recipe, model=recipe.model and recipe.model.with_layers(layers))
    return source, recipe


def _default_recipe(name: str, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe of someone who chose none: the defaults, named after the checkpoint."""
    table: dict[str, Any] = {"name": name}
    for key, value in overrides.items():
        *path, last = key.split(".")
        inner = table
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UsageError(f"--set gives {part} a value, and {key} needs it to be a table: give only one.")
        inner[last] = value
    return Recipe.from_dict(table)


def _check_engine(recipe: Recipe, *, no_weights: bool) -> None:
    """Refuses before anything is built what would be refused after the bundle."""
    from glm_export.exporter.tensorrt.estimate import check_machine

    if no_weights:
        raise UsageError(f"--no-weights leaves nothing to build an engine for {recipe.target} from: use one of both.")
    check_machine(recipe.target, recipe.precision, recipe.engine)


def _build_engine(out: Path, recipe: Recipe, reporter: Reporter) -> Manifest:
    from glm_export.exporter.tensorrt.builder import EngineChoices, build_engine
    from glm_export.runtime.bundle import Bundle

    bundle = Bundle.open(out, check="size")  # written just now
    reporter.note(f"{out} is complete; if its engine fails: glm-export engine {out} --target {recipe.target}")
    choices = EngineChoices(
        target=recipe.target, batch=bundle.manifest.batch, capacity=bundle.manifest.capacity, engine=recipe.engine
    )
    return build_engine(bundle, choices, reporter, hashed=True)


def _source(
    checkpoint: Path | None, recipe: Recipe, *, no_weights: bool, ignored: Collection[str]
) -> Checkpoint | Glm4MoeConfig:
    """What the bundle is built from."""
    if not no_weights:
        if checkpoint is None:
            raise UsageError("CKPT is missing: give a checkpoint directory, or --no-weights for only the graph.")
        from glm_export.exporter.source.checkpoint import Checkpoint

        return Checkpoint.open(checkpoint, ignored)
    if checkpoint is not None:
        return Glm4MoeConfig.from_file(checkpoint / "config.json", ignored)
    if recipe.model is None:
        raise UsageError("--no-weights has no architecture: give CKPT with a config.json, or a recipe with a [model].")
    return recipe.model
