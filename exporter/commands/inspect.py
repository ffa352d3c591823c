"""`glm-export inspect`: what a bundle holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from glm_export.exporter.commands.options import PATH, bundle_argument, json_option, print_json, size
from glm_export.runtime.engine_info import ENGINE_TARGETS
from glm_export.runtime.errors import UsageError, printable


@click.command()
@bundle_argument
@click.option("--target", type=click.Choice(ENGINE_TARGETS), help="Show the network that this target builds, by layer.")
@click.option("--save-onnx", type=PATH, metavar="FILE", help="With --target: write that network's graph as ONNX.")
@json_option
def inspect(bundle_path: Path, target: str | None, save_onnx: Path | None, as_json: bool) -> None:
    """Show what a bundle holds.

    That is precision, sizes, bindings, graph, engines, files with their hashes, source, versions, recipe and config.
    With --target it is the network that the target's engine is built from: bindings and layers with their dtypes,
    shapes and plugins. FILE has its weights where model.onnx has them: in weights/ of the folder it lies in.
    """
    if save_onnx and not target:
        raise UsageError("--save-onnx writes the graph for a target: say which with --target.")

    from glm_export.runtime.bundle import Bundle

    bundle = Bundle.open(bundle_path, check="size")
    if target:
        from glm_export.exporter.tensorrt.inspect import inspect_network, save_graph

        if save_onnx:
            save_graph(bundle, target, save_onnx)
        found, lines = inspect_network(bundle, target), _network_lines
    else:
        from glm_export.exporter.inspect import inspect_bundle

        found, lines = inspect_bundle(bundle), _lines
    if as_json:
        print_json(found)
    else:
        click.echo("\n".join(map(printable, lines(found))))


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
    for target, engine in found["engines"].items():
        yield from _section(f"engine {target}", _flat(engine))
    yield from _section(
        "files", ((path, f"{size(file['size']):>8}  {file['sha256'][:16]}") for path, file in found["files"].items())
    )
    for table in ("source", "versions", "recipe", "config"):
        yield from _section(table, _flat(found[table]))


def _network_lines(found: dict[str, Any]) -> Iterator[str]:
    """The network without what only computes shapes."""
    rows = f"{found['batch']} x {found['capacity']} tokens, {found['prefill']} of them in one step"
    yield f"{found['path']}: {found['target']} {found['library_version']}, at most {rows}"
    for way in ("inputs", "outputs"):
        yield from _section(way, _bindings(found[way]))
    yield from _section("layers that must be there", ((kind, str(count)) for kind, count in found["counts"].items()))
    shown = [layer for layer in found["layers"] if layer["kind"] != "constant" and any(map(_is_data, layer["outputs"]))]
    title = f"layers ({len(shown)} of {len(found['layers'])}: constants and shapes are left out)"
    yield from _section(title, ((_kind(layer), _signature(layer)) for layer in shown))
    if found["engine"] is not None:
        yield from _section(
            "engine", ((str(i), json.dumps(layer)) for i, layer in enumerate(found["engine"]["Layers"]))
        )


def _kind(layer: dict[str, Any]) -> str:
    """What a layer is, with what a reader of a product or an attention wants to know."""
    kind = str(layer["plugin"] or layer["kind"])
    if layer["fp8_weight"]:
        kind += " fp8 x fp8"
    if layer["causal"]:
        kind += f" {layer['causal']}" + (" with lengths" if layer["kv_lengths"] else "")
    return kind


def _signature(layer: dict[str, Any]) -> str:
    """dtype[shape], ... -> dtype[shape]  name."""
    ways = (", ".join(map(_value, filter(None, layer[way]))) for way in ("inputs", "outputs"))
    return f"{' -> '.join(ways)}  {layer['name']}"


def _value(value: dict[str, Any]) -> str:
    return f"{value['dtype']}[{','.join('?' if dim < 0 else str(dim) for dim in value['shape'])}]"


def _is_data(value: dict[str, Any]) -> bool:
    """Not a shape, an index or a mask."""
    return value["dtype"] not in ("int32", "int64", "bool")


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
        shape = ",".join("?" if dim == -1 else str(dim) for dim in binding["shape"])
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
