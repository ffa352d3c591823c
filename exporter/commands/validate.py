"""`glm-export validate`: how far the engine is from the reference."""

from __future__ import annotations

from pathlib import Path

import click

from glm_export.exporter.commands.options import (
    COUNT,
    PATH,
    bundle_argument,
    json_option,
    print_json,
    quiet_option,
    require_engine,
    target_option,
    threads_option,
)
from glm_export.runtime.errors import AccuracyError


@click.command()
@bundle_argument
@click.option("--checkpoint", type=PATH, metavar="DIR", help="Where the checkpoint is now; without, where it was.")
@click.option(
    "--drift/--no-drift", default=True, help="Also compare with the unquantized reference.", show_default=True
)
@click.option("--prompts", type=COUNT, metavar="N", help="Prompts; without, the recipe's, as for the next three.")
@click.option("--prompt-tokens", type=COUNT, metavar="N", help="Tokens of the longest prompt.")
@click.option("--steps", type=COUNT, metavar="N", help="Cached steps after the prompts.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of the prompts.")
@target_option
@threads_option
@quiet_option
@json_option
def validate(
    bundle_path: Path,
    checkpoint: Path | None,
    drift: bool,
    prompts: int | None,
    prompt_tokens: int | None,
    steps: int | None,
    seed: int | None,
    target: str,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare an engine with the reference.

    Prints how far the engine of BUNDLE is from the PyTorch reference and writes the same to reports/validation.json.
    The exit code is 4 if that is further than the tolerances.
    """
    require_engine(target)

    from glm_export.exporter.progress import Reporter
    from glm_export.exporter.validate import validate
    from glm_export.runtime.bundle import Bundle

    report = validate(
        Bundle.open(bundle_path),
        target=target,
        checkpoint=checkpoint,
        drift=drift,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        steps=steps,
        seed=seed,
        threads=threads,
        reporter=Reporter(quiet=quiet),
    )
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo("\n".join(report.lines()))
    if not report.passed:
        raise AccuracyError(f"{bundle_path} is further from the reference than its tolerances: see the report.")
