"""`glm-export inspect`: what a bundle holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from glm_export.exporter.commands.options import bundle_argument, json_option, print_json, size


@click.command()
@bundle_argument
@json_option
def inspect(bundle_path: Path, as_json: bool) -> None:
    """Show what a bundle holds.

    That is precision, sizes, bindings, graph, engines, files with their hashes, source, versions, recipe and config.
    """
    from glm_export.exporter.inspect import inspect_bundle
    from glm_export.runtime.bundle import Bundle

    found = inspect_bundle(Bundle.open(bundle_path))
    if as_json:
        print_json(found)
    else:
        click.echo("\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    counts, weights = found["parameters"], found["weight_bytes"]
    yield f"{found['path']}: {found['name']} in {found['precision']}, {size(found['total_bytes'])}"
    yield f"{counts['total']:,} parameters, {counts['active']:,} of them active for a token"
    kv = found["kv_bytes_per_token"]
    rows = f"{found['batch']} x {found['capacity']} tokens"
    yield f"KV cache {size(kv)} per token, {size(kv * found['batch'] * found['capacity'])} for {rows}"
    yield from _section(
        f"weights ({size(sum(weights.values()))})" if found["has_weights"] else "weights (not in this bundle)",
        ((kind, size(count)) for kind, count in weights.items() if count),
    )
    for way in ("inputs", "outputs"):
        yield from _section(way, _bindings(found["bindings"][way]))
    yield from _section("nodes", ((op, str(count)) for op, count in found["nodes"].items()))
    yield from _section("engines", ((target, ", ".join(paths)) for target, paths in found["engines"].items()))
    yield from _section(
        "files", ((path, f"{size(file['size']):>8}  {file['sha256'][:16]}") for path, file in found["files"].items())
    )
    for table in ("source", "versions", "recipe", "config"):
        yield from _section(table, _flat(found[table]))


def _section(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A title and its rows in two columns; nothing without rows."""
    table = list(rows)
    if table:
        width = max(len(name) for name, _ in table)
        yield ""
        yield title
        yield from (f"  {name:<{width}}  {value}" for name, value in table)


def _bindings(bindings: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Bindings that differ only in their layer on one line: k_cache.0..45."""
    layers: dict[tuple[str, str], list[str]] = {}
    for binding in bindings:
        stem, _, layer = binding["name"].partition(".")
        shape = ",".join(map(str, binding["shape"]))
        layers.setdefault((stem, f"{binding['dtype']} [{shape}]"), []).append(layer)
    for (stem, kind), found in layers.items():
        span = f".{found[0]}..{found[-1]}" if len(found) > 1 else f".{found[0]}" if found[0] else ""
        yield stem + span, kind


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested tables as path.to.key rows, as --set spells them."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):  # the shards of a checkpoint
            yield from ((f"{prefix}{key}.{i}", "  ".join(map(str, item.values()))) for i, item in enumerate(value))
        elif value is not None:
            yield f"{prefix}{key}", str(value)
