"""`glm-export verify`: whether every file of a bundle is what its manifest says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from glm_export.exporter.commands.options import (
    bundle_argument,
    json_option,
    print_json,
    quiet_option,
    size,
    threads_option,
)
from glm_export.runtime.errors import IntegrityError


@click.command()
@bundle_argument
@threads_option
@quiet_option
@json_option
def verify(bundle_path: Path, threads: int | None, quiet: bool, as_json: bool) -> None:
    """Hash every file of a bundle.

    Lists all that is missing, changed or not in the manifest; the exit code is 8 if there is any.
    """
    from glm_export.exporter.progress import Reporter
    from glm_export.runtime.bundle import Bundle

    bundle = Bundle.open(bundle_path, check="manifest")
    with Reporter(quiet=quiet).stage("hashing", bundle.total_bytes) as advance:
        report = bundle.verify(advance, threads=threads)
    if as_json:
        print_json({"path": str(bundle_path), "ok": bool(report)} | dataclasses.asdict(report))
    else:
        for problem in report.problems:
            click.echo(f"{problem.kind}: {problem.message}")
        click.echo(f"{report.files} of {len(bundle.manifest.files)} files are as recorded, {size(report.bytes)}")
    if not report:
        count = len(report.problems)
        raise IntegrityError(
            f"{bundle_path} has {count} {'file' if count == 1 else 'files'} that the manifest does not describe: "
            "copy the bundle again, or build it again."
        )
