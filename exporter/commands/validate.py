"""`glm-export validate`: how far the engine is from the reference."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm_export.exporter.commands.options import (
    COUNT,
    PATH,
    bundle_argument,
    cache_dtype_option,
    json_option,
    open_bundle,
    print_json,
    quiet_option,
    target_option,
    threads_option,
    trust_size_option,
)
from glm_export.exporter.recipe import TARGETS
from glm_export.runtime.errors import AccuracyError, UsageError, missing_library

if TYPE_CHECKING:
    from glm_export.exporter.against import AgainstReport
    from glm_export.exporter.validate import Report

AGAINST = (*TARGETS, "portable")


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
@click.option(
    "--against", type=click.Choice(AGAINST), help="Compare with this engine; portable is onnxruntime without kernels."
)
@click.option("--save-outputs", type=PATH, metavar="FILE.json", help="With --against: both logits, for polygraphy.")
@cache_dtype_option
@threads_option
@trust_size_option
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
    against: str | None,
    save_outputs: Path | None,
    cache_dtype: str | None,
    threads: int | None,
    trust_size: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare an engine with the reference, or with another engine.

    Prints how far the engine of BUNDLE is from the PyTorch reference and writes the same to reports/validation.json.
    With --against, two engines are given the same tokens, and reports/TARGET-against-OTHER.json says how far they are
    apart and which of them is off. The exit code is 4 if the distance is larger than the tolerance.
    """
    if against:
        if checkpoint:
            raise UsageError("--checkpoint is for the drift, which --against does not look at: leave one of them out.")
        if cache_dtype:
            raise UsageError(
                "--cache-dtype is not for --against, where each engine has its own: leave one of them out."
            )
        _against(
            bundle_path,
            as_json=as_json,
            trust_size=trust_size,
            target=target,
            against=against,
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            steps=steps,
            seed=seed,
            threads=threads,
            save_outputs=save_outputs,
            quiet=quiet,
        )
        return
    if save_outputs:
        raise UsageError("--save-outputs is for --against: name the other engine, or leave it out.")

    from glm_export.exporter.progress import Reporter
    from glm_export.exporter.validate import validate

    reporter = Reporter(quiet=quiet)
    report = validate(
        open_bundle(bundle_path, reporter, trust_size=trust_size, threads=threads),
        target=target,
        checkpoint=checkpoint,
        drift=drift,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        steps=steps,
        seed=seed,
        threads=threads,
        cache_dtype=cache_dtype,
        reporter=reporter,
    )
    _show(report, as_json=as_json)
    if not report.passed:
        raise AccuracyError(f"{bundle_path} is further from the reference than its tolerances: see the report.")


def _against(
    bundle_path: Path, *, as_json: bool, trust_size: bool, quiet: bool, target: str, against: str, **choices: Any
) -> None:
    if importlib.util.find_spec("polygraphy") is None:
        raise missing_library("--against", "polygraphy", extra="polygraphy")

    from glm_export.exporter.against import validate_against
    from glm_export.exporter.progress import Reporter

    reporter = Reporter(quiet=quiet)
    bundle = open_bundle(bundle_path, reporter, trust_size=trust_size, threads=choices["threads"])
    report = validate_against(bundle, target=target, against=against, reporter=reporter, **choices)
    _show(report, as_json=as_json)
    if not report.passed:
        raise AccuracyError(
            f"The engines {target} and {against} of {bundle_path} are further apart than the tolerance: see the report."
        )


def _show(report: Report | AgainstReport, *, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo("\n".join(report.lines()))
