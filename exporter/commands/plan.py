"""`glm-export plan`: what a build will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from glm_export.exporter.commands.build import choices, what_to_build
from glm_export.exporter.commands.options import PATH, json_option, print_json, quiet_option, size, threads_option


@click.command()
@choices
@click.option("-o", "--output", "out", type=PATH, default=Path("bundle"), metavar="OUT", help="Where the bundle goes.")
@threads_option
@quiet_option
@json_option
def plan(out: Path, threads: int | None, quiet: bool, as_json: bool, **chosen: Any) -> None:
    """Say what a build will take, without building.

    Takes the options of `build` and shows, per stage, what is read and written, the peak of memory and the time, from
    rates measured for a second or two; then the GPUs that hold the bundle. The exit code is 5 if it can not fit.
    """
    source, recipe = what_to_build(**chosen)

    from glm_export.exporter.estimate import Estimate
    from glm_export.exporter.pipeline import default_threads
    from glm_export.exporter.plan import BuildPlan
    from glm_export.exporter.progress import Reporter

    with Reporter(quiet=quiet).stage("measuring disk and CPU"):
        found = Estimate.of(BuildPlan.of(source, recipe), out, threads or default_threads())
    if as_json:
        print_json(found.to_dict())
        return
    table: list[tuple[str, ...]] = [("", "reads", "writes", "memory", "seconds")]
    for each in found.stages:
        table.append((each.name, size(each.reads), size(each.writes), size(each.memory), f"{each.seconds:.1f}"))
    totals = sum(each.reads for each in found.stages), found.disk, found.memory
    table.append(("all", *map(size, totals), f"{found.seconds:.1f}"))
    for row in table:
        click.echo("  ".join(f"{cell:>11}" for cell in row))
    click.echo(f"free: {size(found.disk_free)} of disk, {size(found.memory_free)} of memory")
    if found.rates.read and found.rates.convert:
        quantize = f", quantizes {size(int(found.rates.quantize))}/s per CPU" if found.rates.quantize else ""
        click.echo(
            f"measured: one thread reads {size(int(found.rates.read))}/s{quantize}; all together, "
            f"{found.threads} threads convert {size(int(found.rates.convert))} of the checkpoint per second"
        )
    gpus = ", ".join(f"{count} x {name}" for name, count in found.gpus.items())
    click.echo(f"on GPUs: {size(found.gpu_weights)} of weights, {size(found.gpu_cache)} of KV cache: {gpus}")
