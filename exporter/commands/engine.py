"""`glm-export engine`: another engine for a bundle that is there, such as on the machine with the GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import click

from glm_export.exporter.commands.options import (
    COUNT,
    bundle_argument,
    capabilities,
    json_option,
    print_json,
    quiet_option,
    size,
    sm_option,
)
from glm_export.exporter.recipe import CacheDtype, ExpertsForm, Recipe
from glm_export.runtime.engine_info import ENGINE_TARGETS


@click.command()
@bundle_argument
@click.option("--target", type=click.Choice(ENGINE_TARGETS), required=True, help="What the engine is for.")
@sm_option
@click.option("--capacity", type=COUNT, metavar="C", help="Tokens per row of the KV cache; without, the bundle's.")
@click.option("--max-batch", type=COUNT, metavar="B", help="Rows of the KV cache; without, the bundle's.")
@click.option("--prefill", type=COUNT, metavar="S", help="Most new tokens per row in one step, at most the capacity.")
@click.option("--cache-dtype", type=click.Choice(get_args(CacheDtype)), help="Of the KV cache: fp8 halves it.")
@click.option("--experts", type=click.Choice(get_args(ExpertsForm)), help="Our plugin, or TensorRT's own layer.")
@click.option("--replace", "replaces", is_flag=True, help="Take the place of the engine that is there.")
@quiet_option
@json_option
def engine(
    bundle_path: Path,
    target: str,
    sm: tuple[str, ...] | None,
    capacity: int | None,
    max_batch: int | None,
    replaces: bool,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Add an engine to a bundle.

    The choices that are not given are those of the bundle's recipe. Until the engine is complete the bundle stays as it
    was.
    """
    choices = {key: value for key, value in flags.items() if value is not None}
    if sm is not None:
        choices["compute_capabilities"] = capabilities(sm, target)

    from glm_export.exporter.progress import Reporter
    from glm_export.exporter.tensorrt.builder import EngineChoices, build_engine
    from glm_export.runtime.bundle import Bundle
    from glm_export.runtime.engine_info import EngineInfo

    reporter = Reporter(quiet=quiet)
    bundle = Bundle.open(bundle_path, check="size")  # the builder hashes the weights
    recipe = Recipe.from_dict(bundle.manifest.recipe)
    recipe = dataclasses.replace(recipe, target=target, engine=dataclasses.replace(recipe.engine, **choices))
    build_engine(
        bundle,
        EngineChoices(
            target=target,
            batch=max_batch or bundle.manifest.batch,
            capacity=capacity or bundle.manifest.capacity,
            engine=recipe.engine,
        ),
        reporter,
        replaces=replaces,
    )
    info = EngineInfo.read(Bundle.open(bundle_path, check="size"), target)
    if as_json:
        print_json({"path": str(bundle_path)} | info.to_json())
    else:
        click.echo(f"{bundle_path}: {target}, {size(info.plan_bytes)}, {info.build_seconds:.1f} s")
