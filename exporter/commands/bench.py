"""`glm-export bench`: how fast a bundle runs here, beside what the machine allows."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from glm_export.exporter.commands.options import (
    COUNT,
    PATH,
    CommaSeparated,
    bundle_argument,
    json_option,
    open_bundle,
    print_json,
    quiet_option,
    target_option,
    threads_option,
    trust_size_option,
)
from glm_export.runtime.errors import InputError, UsageError


@click.command()
@bundle_argument
@click.option("--prefill", type=CommaSeparated(int), metavar="128,512", help="Tokens of prompts.")
@click.option("--context", type=CommaSeparated(int), metavar="128,1024", help="Tokens in the cache while decoding.")
@click.option("--batch", type=CommaSeparated(int), metavar="1,8", help="Rows that decode together.")
@click.option("--repeats", type=COUNT, metavar="N", help="How often everything is measured, after a warm-up.")
@click.option("--capacity", type=COUNT, metavar="C", help="Tokens per row of the KV cache; without, what is needed.")
@target_option
@threads_option
@click.option("-o", "--output", "out", type=PATH, metavar="FILE.json", help="Write the JSON there too.")
@trust_size_option
@quiet_option
@json_option
def bench(
    bundle_path: Path,
    prefill: tuple[int, ...] | None,
    context: tuple[int, ...] | None,
    batch: tuple[int, ...] | None,
    repeats: int | None,
    capacity: int | None,
    target: str,
    threads: int | None,
    out: Path | None,
    trust_size: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure how fast a bundle runs.

    Prefill by length, decoding by tokens in the cache, and by batch after the first --context; time to the first
    token; memory. Beside every figure is what the machine allowed at that moment: bytes that a token needs over the
    measured read bandwidth, arithmetic over the measured rate of it. The median counts, with the range of all repeats.
    Without the first three options, what fits of 128, 512 and 2048; 128, 1024 and 8192; 1 and 8.
    """
    for name, values in (("--prefill", prefill), ("--context", context), ("--batch", batch)):
        if values is not None and (min(values, default=1) < 1 or (name == "--batch" and not values)):
            raise UsageError(f"{name} is {','.join(map(str, values))!r}: expected numbers of 1 or more, such as 1,8.")
    if out and not out.parent.is_dir():  # said before the work, not after it
        raise InputError(f"{out.parent} is no folder: make it, or write the figures elsewhere.")

    from glm_export.exporter.bench import REPEATS, Plan, bench
    from glm_export.exporter.progress import Reporter

    reporter = Reporter(quiet=quiet)
    started = time.perf_counter()
    bundle = open_bundle(bundle_path, reporter, trust_size=trust_size, threads=threads)
    check_seconds = time.perf_counter() - started
    plan = Plan.of(
        bundle,
        target,
        lengths=prefill,
        contexts=context,
        batches=batch,
        repeats=repeats or REPEATS,
        capacity=capacity,
    )
    report = bench(
        bundle,
        plan,
        target=target,
        check_seconds=check_seconds,
        threads=threads,
        capacity=capacity,
        reporter=reporter,
    )
    if out:
        out.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo("\n".join(report.lines()))
