"""`glm-export checkpoint`: an FP8 checkpoint for engines that serve on several GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm_export.exporter.commands.options import PATH, json_option, print_json, quiet_option, size, threads_option

if TYPE_CHECKING:
    from glm_export.exporter.hf_checkpoint import Format

_FORMATS: tuple[Format, ...] = ("compressed-tensors", "modelopt")


@click.command()
@click.argument("source_path", metavar="BUNDLE|CKPT", type=PATH)
@click.option("--format", "format_name", type=click.Choice(_FORMATS), default=_FORMATS[0], show_default=True)
@click.option("-o", "--output", "out", type=PATH, required=True, metavar="DIR", help="The checkpoint; must not exist.")
@click.option("--ignore-config-key", "ignored", multiple=True, metavar="K", help="Accept this key of config.json.")
@threads_option
@quiet_option
@json_option
def checkpoint(
    source_path: Path,
    format_name: Format,
    out: Path,
    ignored: tuple[str, ...],
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write an FP8 checkpoint that vLLM, SGLang and TensorRT-LLM serve.

    The source is a bundle, or a checkpoint of any format that `build` reads. The weights are those of an fp8 bundle:
    what is FP8 per channel already is carried over bit for bit. Prints how to serve it on the GPUs that hold it.
    """
    from glm_export.exporter.hf_checkpoint import write_hf_checkpoint
    from glm_export.exporter.progress import Reporter
    from glm_export.exporter.serving import launch_lines, splits
    from glm_export.exporter.source.bundle_source import checkpoint_of
    from glm_export.exporter.source.checkpoint import Checkpoint
    from glm_export.runtime.bundle import Bundle
    from glm_export.runtime.manifest import MANIFEST_NAME

    if (source_path / MANIFEST_NAME).exists():
        source = checkpoint_of(Bundle.open(source_path))
    else:
        source = Checkpoint.open(source_path, ignored)
    written = write_hf_checkpoint(source, source_path, out, format_name, Reporter(quiet=quiet), threads=threads)
    ways = splits(written.weight_bytes, source.config.num_key_value_heads)
    launch: list[dict[str, Any]] = [
        {"gpus": gpus, "tensor_parallel": count, "commands": list(launch_lines(out, format_name, count))}
        for count, gpus in ways.items()
    ]
    if as_json:
        result: dict[str, Any] = {
            "path": str(out),
            "format": format_name,
            "bytes": written.weight_bytes,
            "files": written.files,
            "quantized": written.quantized,
            "mtp": written.mtp,
            "launch": launch,
        }
        print_json(result)
        return
    mtp = "with" if written.mtp else "without"
    click.echo(
        f"{out}: {format_name}, {size(written.weight_bytes)} in {written.files} files, {written.quantized} matrices in "
        f"FP8, {mtp} multi-token prediction"
    )
    for way in launch:
        click.echo(
            f"\nserve it on {way['tensor_parallel']} x {' or '.join(way['gpus'])} (weights only; caches want room):"
        )
        for line in way["commands"]:
            click.echo(f"  {line}")
