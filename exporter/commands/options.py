"""What several commands share: arguments, options, and how results are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm_export.exporter.recipe import TARGETS
from glm_export.runtime.contract import CACHE_DTYPES
from glm_export.runtime.errors import UsageError

if TYPE_CHECKING:
    from glm_export.exporter.progress import Reporter
    from glm_export.runtime.bundle import Bundle

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)

DEFAULT_TARGET = "onnxruntime"

bundle_argument = click.argument("bundle_path", metavar="BUNDLE", type=PATH)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
cache_dtype_option = click.option(
    "--cache-dtype", type=click.Choice(CACHE_DTYPES), help="Of the KV cache; without, the bundle's compute dtype."
)
threads_option = click.option("--threads", type=COUNT, metavar="N", help="CPU threads.")
trust_size_option = click.option(
    "--trust-size", is_flag=True, help="Check the weights by size only: faster, and a damaged file goes unnoticed."
)
target_option = click.option(
    "--target", type=click.Choice(TARGETS), default=DEFAULT_TARGET, show_default=True, help="The engine to run."
)


class CommaSeparated(click.ParamType[tuple[Any, ...]]):
    """`a,b,c` as a tuple; an empty text has no items."""

    def __init__(self, kind: type[int] | type[str]) -> None:
        self.kind = kind
        self.name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Splits and converts; see click.ParamType."""
        if isinstance(value, tuple):
            return value
        items = [item.strip() for item in value.split(",")] if value.strip() else []
        try:
            return tuple(self.kind(item) for item in items)
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 1,2,3.", param, ctx)


sm_option = click.option(
    "--sm", type=CommaSeparated(str), metavar="89,120", help="GPUs to build for; only tensorrt-rtx, without one."
)


def capabilities(sm: tuple[str, ...], target: str) -> tuple[str, ...]:
    """What --sm names, as engine.compute_capabilities spells it: 89 and 8.9 are 8.9.

    Raises:
        UsageError: the target is not built for chosen GPUs.
    """
    if target != "tensorrt-rtx":
        raise UsageError(f"--sm is for the target tensorrt-rtx, not for {target}: leave it out.")
    return tuple(f"{item[:-1]}.{item[-1]}" if item.isdecimal() else item for item in sm)


def open_bundle(path: Path, reporter: Reporter, *, trust_size: bool, threads: int | None = None) -> Bundle:
    """Opens a bundle to use it: every file is hashed first, unless the user trusts the sizes of the large ones."""
    from glm_export.runtime.bundle import Bundle

    if trust_size:
        return Bundle.open(path, check="size")
    total = Bundle.open(path, check="manifest").total_bytes
    with reporter.stage("checking the bundle", total) as advance:
        return Bundle.open(path, progress=advance, threads=threads)


def print_json(value: object) -> None:
    """Prints one JSON object on one line, which `jq` and a line reader both take."""
    click.echo(json.dumps(value, allow_nan=False))


def size(count: int) -> str:
    """A number of bytes for people."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}" if unit != "B" else f"{count} B"
        amount /= 1000
    return f"{amount:.3g} TB"
