"""`glm-export make-checkpoint`: random weights for any config, to try everything else on."""

from __future__ import annotations

from pathlib import Path

import click

from glm_export.exporter.commands.options import COUNT, PATH, quiet_option
from glm_export.exporter.config import DTYPES, Glm4MoeConfig
from glm_export.exporter.recipe import load_recipe
from glm_export.runtime.errors import UsageError


@click.command("make-checkpoint")
@click.option("--recipe", metavar="R", help="A built-in recipe or a .toml file, for its [model].")
@click.option("--config", "config_path", type=PATH, metavar="FILE", help="A config.json, instead of a recipe.")
@click.option("-o", "--output", "out", type=PATH, required=True, metavar="DIR", help="A new or empty directory.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all weights.")
@click.option("--layers", type=COUNT, metavar="N", help="Keep only the first N layers.")
@click.option("--packed", is_flag=True, help="Store the experts of a layer in two tensors, as transformers holds them.")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of the weights.")
@quiet_option
def make_checkpoint(
    recipe: str | None,
    config_path: Path | None,
    out: Path,
    seed: int,
    layers: int | None,
    packed: bool,
    dtype: str,
    quiet: bool,
) -> None:
    """Write a checkpoint with random weights.

    It comes with a small tokenizer and a chat template, and stands in for a real one.
    """
    config = _config(recipe, config_path)
    if layers is not None:
        config = config.with_layers(layers)

    from glm_export.exporter.progress import Reporter
    from glm_export.exporter.random_checkpoint import write_random_checkpoint

    with Reporter(quiet=quiet).stage("writing random weights"):
        write_random_checkpoint(config, out, seed=seed, dtype=dtype, packed=packed)
    click.echo(f"{out}: {config.num_hidden_layers} layers of random weights in {dtype}")


def _config(recipe: str | None, config_path: Path | None) -> Glm4MoeConfig:
    if config_path is not None and recipe is None:
        return Glm4MoeConfig.from_file(config_path)
    if recipe is None or config_path is not None:
        raise UsageError("The architecture comes from one place: give either --recipe or --config.")
    model = load_recipe(recipe).model
    if model is None:
        raise UsageError(f"The recipe {recipe} has no [model]: choose one that has, or give --config.")
    return model
