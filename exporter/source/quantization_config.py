"""Reads what a checkpoint says about its FP8 weights, in the three dialects that vendors write.

    compressed-tensors   config.json: groups of targets, each per channel, per tensor or in blocks, and an ignore list
    fp8                  config.json: blocks of 128x128 (or per tensor) in all linears but those in a list
    modelopt             hf_quant_config.json, config.json or both: one algorithm for all linears but those in a list

A key that could change what the numbers mean and is not understood here is refused.
"""

from __future__ import annotations

import fnmatch
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from glm_export.exporter.config import key_and_hint
from glm_export.exporter.source.quantized import Names, Quantization, Scheme
from glm_export.runtime.errors import InputError

Table = Mapping[str, Any]

HF_QUANT_CONFIG = "hf_quant_config.json"

_FORMATS = ("float-quantized", "naive-quantized")  # two names of one layout: the values as they are

# Key of a group's weights, what compressed-tensors takes it for without, and what it must be.
_WEIGHTS = (("num_bits", 8, 8), ("type", "int", "float"), ("symmetric", True, True), ("dynamic", False, False))

# What a config group may be called, with only its targets as the value.
_PRESETS = {
    "FP8_DYNAMIC": Scheme(rows=1, columns=None),
    "FP8": Scheme(rows=None, columns=None, activations="statically per tensor"),
    "FP8_BLOCK": Scheme(rows=128, columns=128, activations="dynamically per group"),
}

_ALGORITHMS = {
    "FP8": Scheme(rows=None, columns=None, activations="statically per tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(rows=1, columns=None),
    "FP8_PB_WO": Scheme(rows=128, columns=128, activations="not at all"),
}

_MOST_PATTERNS = 100


def parse_quantization(
    config: Table, hf_quant: Table | None, source: str, ignore: Collection[str] = ()
) -> Quantization | None:
    """Reads what is said about quantization.

    Args:
        config: the parsed config.json.
        hf_quant: the parsed hf_quant_config.json, where there is one.
        source: what error messages call config.json.
        ignore: unknown keys to accept.

    Returns:
        None for a checkpoint that is not quantized.

    Raises:
        InputError: another kind of quantization than FP8 with such scales, or two files that contradict each other.
    """
    table = config.get("quantization_config")
    if table is None and hf_quant is None:
        return None
    try:
        if table is None:
            return _modelopt({}, hf_quant, ignore)
        if not isinstance(table, dict):
            raise InputError(f"is {reprlib.repr(table)}, expected an object.")
        method = table.get("quant_method")
        if not isinstance(method, str) or method not in _DIALECTS:
            raise InputError(
                f"quant_method is {reprlib.repr(method)}, but only {', '.join(_DIALECTS)} are read; use the vendor's "
                "FP8 checkpoint, or the BF16 one and build with --precision fp8."
            )
        if hf_quant is not None and method != "modelopt":
            raise InputError(f"quant_method is {method!r}, but {HF_QUANT_CONFIG} is ModelOpt's; remove the wrong one.")
        return _DIALECTS[method](table, hf_quant, ignore)
    except InputError as error:
        raise InputError(f"{source}: quantization_config: {error}") from None


def _compressed_tensors(table: Table, _: Table | None, ignore: Collection[str]) -> Quantization:
    known = ("quant_method", "config_groups", "format", "ignore", "quantization_status", "kv_cache_scheme", "version")
    sparse = table.get("sparsity_config")
    dense = ("sparsity_config",) if isinstance(sparse, dict) and sparse.get("format") == "dense" else ()
    _no_other_keys(table, (*known, "global_compression_ratio", *dense), ignore)
    if table.get("format") is not None:
        _one_of(table, "format", (*_FORMATS, "mixed-precision"))
    groups = table.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError("has no config_groups; expected a table of schemes with their targets.")
    return Quantization(
        method="compressed-tensors",
        groups=tuple(_group(name, group, ignore) for name, group in groups.items()),
        ignored=_targets(table, "ignore"),
    )


def _group(name: str, group: object, ignore: Collection[str]) -> tuple[Names, Scheme]:
    try:
        if isinstance(group, list) and name in _PRESETS:
            return _targets({"targets": group}, "targets"), _PRESETS[name]
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise InputError(f"is {reprlib.repr(group)}, expected a scheme with targets and weights.")
        _no_other_keys(group, ("targets", "weights", "input_activations", "format"), ignore)
        if group.get("format") is not None:
            _one_of(group, "format", _FORMATS)
        weights = group["weights"]
        calibration = ("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype", "group_size")
        known = ("num_bits", "type", "symmetric", "strategy", "block_structure", "dynamic")
        _no_other_keys(weights, (*known, *calibration), ignore)
        for key, default, expected in _WEIGHTS:
            seen = weights.get(key, default)
            if seen != expected or type(seen) is not type(expected):
                raise InputError(f"weights.{key} is {reprlib.repr(seen)}, but only {expected!r} is read, which is FP8.")
        strategy = _one_of(weights, "strategy", ("channel", "tensor", "block"))
        extents: tuple[int | None, int | None] = (1 if strategy == "channel" else None, None)
        if strategy == "block":
            extents = _block(weights, "block_structure")
        activations = _activations(group.get("input_activations"))
        return _targets(group, "targets"), Scheme(rows=extents[0], columns=extents[1], activations=activations)
    except InputError as error:
        raise InputError(f"config_groups.{name[:100]}: {error}") from None


def _activations(table: object) -> str:
    if table is None:
        return "not at all"
    if not isinstance(table, dict):
        raise InputError(f"input_activations is {reprlib.repr(table)}, expected a table.")
    if table.get("num_bits", 8) != 8 or table.get("type", "float") != "float":
        raise InputError(f"input_activations is {reprlib.repr(table)}, but only FP8 activations are supported.")
    when = "dynamically" if table.get("dynamic") else "statically"
    strategies = ("token", "tensor", "group", "tensor_group", "channel", "block")
    return f"{when} per {_one_of({'strategy': table.get('strategy') or 'tensor'}, 'strategy', strategies)}"


def _fp8(table: Table, _: Table | None, ignore: Collection[str]) -> Quantization:
    known = ("quant_method", "activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers")
    spelled = {"fmt": ("e4m3",), "scale_fmt": ("float",), "expert_dtype": ("fp8",)}
    _no_other_keys(table, (*known, *spelled, "is_checkpoint_fp8_serialized"), ignore)
    for key, values in spelled.items():
        if table.get(key) is not None:
            _one_of(table, key, values)
    activations = "dynamically"
    if (
        table.get("activation_scheme") is not None
        and _one_of(table, "activation_scheme", ("dynamic", "static")) == "static"
    ):
        activations = "statically"
    if table.get("weight_block_size") is None:
        scheme = Scheme(rows=None, columns=None, activations=f"{activations} per tensor")
    else:
        rows, columns = _block(table, "weight_block_size")
        scheme = Scheme(rows=rows, columns=columns, activations=f"{activations} per group")
    names = [*_strings(table, "modules_to_not_convert"), *_strings(table, "ignored_layers")]
    # transformers takes a name for a branch, an ending, or an expression that ends where a name does.
    patterns = _guarded(name for name in names if set(name) & set("*+?[](){}|\\^$"))
    return Quantization(
        method="fp8",
        groups=((Names(every=True), scheme),),
        ignored=Names(
            [name.removesuffix(".") for name in names],
            [f"(?:{pattern})(?:(?<=\\.)|(?=\\.|$))" for pattern in patterns],
            branches=True,
        ),
    )


def _modelopt(table: Table, hf_quant: Table | None, ignore: Collection[str]) -> Quantization:
    tables = [table] if hf_quant is None or table.get("quant_algo") is not None else []
    if hf_quant is not None:
        inner = hf_quant.get("quantization")
        if not isinstance(inner, dict):
            raise InputError(f"{HF_QUANT_CONFIG} has no table 'quantization'; copy it again.")
        tables.append(inner)
    known = ("quant_method", "quant_algo", "ignore", "exclude_modules", "producer", "config_groups")
    caches = ("kv_cache_scheme", "kv_cache_quant_algo")
    found = set()
    for each in tables:
        _no_other_keys(each, (*known, *caches), ignore)
        algorithm = each.get("quant_algo")
        if not isinstance(algorithm, str) or algorithm.upper() not in _ALGORITHMS:
            raise InputError(f"quant_algo is {reprlib.repr(algorithm)}, but only {', '.join(_ALGORITHMS)} are read.")
        found.add((algorithm.upper(), frozenset((*_strings(each, "ignore"), *_strings(each, "exclude_modules")))))
    if len(found) > 1:
        raise InputError(f"config.json and {HF_QUANT_CONFIG} say different things; copy the right one again.")
    ((algorithm, names),) = found
    globs = [fnmatch.translate(name) for name in sorted(names) if set(name) & set("*?[")]
    if len(globs) > _MOST_PATTERNS:
        raise InputError(f"has {len(globs)} patterns, more than {_MOST_PATTERNS}; write the names out.")
    return Quantization(
        method="modelopt", groups=((Names(every=True), _ALGORITHMS[algorithm]),), ignored=Names(names, globs)
    )


_DIALECTS: dict[str, Callable[[Table, Table | None, Collection[str]], Quantization]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _modelopt,
}


def _targets(table: Table, key: str) -> Names:
    """Of compressed-tensors: names, expressions after `re:`, or the class Linear, which all that are looked up have."""
    entries = _strings(table, key)
    patterns = _guarded(entry.removeprefix("re:") for entry in entries if entry.startswith("re:"))
    return Names([entry for entry in entries if not entry.startswith("re:")], patterns, every="Linear" in entries)


def _guarded(patterns: Iterable[str]) -> list[str]:
    """Regular expressions that are safe to run: a repeated group can take exponential time."""
    checked = list(patterns)
    if len(checked) > _MOST_PATTERNS:
        raise InputError(f"has {len(checked)} patterns, more than {_MOST_PATTERNS}; write the names out.")
    for pattern in checked:
        plain = re.sub(r"\\[^1-9]", "x", pattern)  # without escaped characters, but with references to groups
        involved = re.search(r"\)[*+{]|\\|\(\?[^:!=]", plain) or len(re.findall(r"[*+{]", plain)) > 4
        if len(pattern) > 500 or involved:
            raise InputError(f"the pattern {reprlib.repr(pattern)} is too involved; write the names out.")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"the pattern {reprlib.repr(pattern)} is no regular expression ({error}).") from None
    return checked


def _block(table: Table, key: str) -> tuple[int, int]:
    value = table.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 1 <= n < 2**31 for n in value):
        raise InputError(f"{key} is {reprlib.repr(value)}, expected rows and columns of a block as [128, 128].")
    return value[0], value[1]


def _strings(table: Table, key: str) -> list[str]:
    value = table.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise InputError(f"{key} is {reprlib.repr(value)}, expected a list of module names.")
    return value


def _one_of(table: Table, key: str, values: tuple[str, ...]) -> str:
    value = table.get(key)
    if not isinstance(value, str) or value not in values:
        raise InputError(f"{key} is {reprlib.repr(value)}, expected {' or '.join(map(repr, values))}.")
    return value


def _no_other_keys(table: Table, known: Collection[str], ignore: Collection[str]) -> None:
    for key, value in table.items():
        if key not in known and key not in ignore and value not in (None, False, {}, []):
            raise InputError(
                f"has the unsupported key {key_and_hint(key, known)}; if it changes no number, accept it with "
                f"--ignore-config-key {key[:100]}."
            )
