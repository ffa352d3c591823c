"""A recipe: all choices of a build, read from TOML.

Built-in recipes are the files of `glm_export.recipes`; a recipe may extend another one and then only says what differs.
"""

from __future__ import annotations

import importlib.resources
import os
import tomllib
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from dataclasses import field as with_default
from pathlib import Path
from typing import Any, Literal, cast, get_args

from glm_export.exporter.config import (
    ALIASES,
    MODEL_TYPE,
    ROPE_TABLES,
    Glm4MoeConfig,
    check_type,
    key_and_hint,
    plural,
)
from glm_export.exporter.source.source_file import read_text_file
from glm_export.runtime.contract import COMPUTE_DTYPES, OPTIONAL_OUTPUTS, LogitsMode
from glm_export.runtime.errors import InputError, UsageError

PRECISIONS = tuple(COMPUTE_DTYPES)
TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx")

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities of GPUs that TensorRT-RTX compiles for."""
CacheDtype = Literal["compute", "fp8"]
ExpertsForm = Literal["plugin", "trt_moe"]
_TEXTS = ("LogitsMode", "CacheDtype", "ExpertsForm")

# Nothing that is built: training leftovers, the dtype, which each stored tensor has for itself, and the layers for
# multi-token prediction, which some checkpoints come without.
_NOT_COMPARED = (
    *("dtype", "initializer_range", "attention_dropout", "use_cache", "output_router_logits"),
    "num_nextn_predict_layers",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What the graph offers."""

    logits: LogitsMode = "last"
    inputs_embeds: bool = False
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """How large an engine's KV cache is: tokens per row, and rows."""

    capacity: int = 4096
    batch: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """How an engine of TensorRT or TensorRT-RTX is built; its capacity and batch are those of [runtime]."""

    prefill: int = 512
    """Most new tokens per row in one step; longer prompts come in chunks."""
    compute_capabilities: tuple[str, ...] = ("8.9", "12.0")
    """Of the GPUs that a TensorRT-RTX engine runs on. One of TensorRT runs on the kind of GPU it is built on."""
    cache_dtype: CacheDtype = "compute"
    """`fp8` halves the KV cache: E4M3 with scale 1."""
    experts: ExpertsForm = "plugin"
    """`trt_moe` is TensorRT's own layer: unquantized, on GPUs of compute capability 10.0, 10.3 or 11.0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validate:
    """What validation runs: seeded prompts of up to `prompt_tokens` tokens, then `steps` cached steps."""

    prompts: int = 4
    prompt_tokens: int = 32
    steps: int = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All choices of a build. Making one checks it.

    Raises:
        UsageError: a value of the wrong type or out of range.
    """

    name: str
    precision: str = "fp8"
    target: str = "onnxruntime"
    export: Export = with_default(default_factory=Export)
    runtime: Runtime = with_default(default_factory=Runtime)
    engine: Engine = with_default(default_factory=Engine)
    validate: Validate = with_default(default_factory=Validate)
    model: Glm4MoeConfig | None = None
    """The architecture this recipe is for; None takes any."""

    def __post_init__(self) -> None:
        _expect_choice("precision", self.precision, PRECISIONS)
        _expect_choice("target", self.target, TARGETS)
        _expect_choice("export.logits", self.export.logits, ("last", "all"))
        for output in self.export.outputs:
            _expect_choice("export.outputs", output, OPTIONAL_OUTPUTS)
        _check_engine(self)
        sizes = {
            "runtime": ("capacity", "batch"),
            "engine": ("prefill",),
            "validate": ("prompts", "prompt_tokens", "steps"),
        }
        for table, names in sizes.items():
            for name in names:
                value = getattr(getattr(self, table), name)
                if not 1 <= value < 2**31:
                    raise UsageError(f"{table}.{name} is {value}, expected a positive size; correct it.")
        needed = self.validate.prompt_tokens + self.validate.steps
        if needed > self.runtime.capacity:
            raise UsageError(
                f"validate.prompt_tokens + validate.steps is {needed}, more than runtime.capacity "
                f"{self.runtime.capacity}; raise the capacity or shorten the validation."
            )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Reads what `to_dict` wrote, or a parsed recipe file without `extends`.

        Raises:
            UsageError: an unknown key, a wrong type, or a value that is not supported.
        """
        try:
            return cast(Recipe, _build(cls, mapping, ""))
        except (InputError, UsageError) as error:
            raise UsageError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain tables, for the manifest; `from_dict` reads it back equal."""
        return asdict(self)


_TABLES = {"export": Export, "runtime": Runtime, "engine": Engine, "validate": Validate, "model": Glm4MoeConfig}


def builtin_recipes() -> tuple[str, ...]:
    """The names of the recipes that come with the package."""
    files = importlib.resources.files("glm_export.recipes").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] = types.MappingProxyType({})) -> Recipe:
    """Loads a recipe by built-in name, or by path when it ends in .toml.

    Args:
        name_or_path: such as "glm-4.5-air-fp8" or "my/recipe.toml".
        overrides: dotted key -> value, such as {"runtime.capacity": 1024}.

    Raises:
        UsageError: no such recipe, not TOML, a circle of `extends`, or as `Recipe.from_dict`.
    """
    table = _resolve(str(name_or_path), Path(), ())
    for key, value in overrides.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        table = _merge(table, value)
    return Recipe.from_dict(table, source=f"recipe {name_or_path}")


def parse_setting(text: str) -> tuple[str, Any]:
    """Splits `path.to.key=value`; the value is TOML, and a bare word is a string.

    Raises:
        UsageError: no `=`, or no key before it.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UsageError(
            f"--set {text!r} is not of the form path.to.key=value; write for example runtime.capacity=1024."
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def check_model(recipe: Recipe, config: Glm4MoeConfig) -> None:
    """Checks that a checkpoint is of the architecture that the recipe is for.

    Raises:
        InputError: with every field that differs.
    """
    if recipe.model is None:
        return
    differing = [
        f"{field.name} is {getattr(config, field.name)}, the recipe has {getattr(recipe.model, field.name)}"
        for field in fields(config)
        if field.name not in _NOT_COMPARED and getattr(config, field.name) != getattr(recipe.model, field.name)
    ]
    if differing:
        raise InputError(
            f"the checkpoint is not the model of recipe {recipe.name}: {'; '.join(differing)}; choose its own recipe, "
            "or one without a [model] table."
        )


def _check_engine(recipe: Recipe) -> None:
    engine = recipe.engine
    for capability in engine.compute_capabilities:
        if capability not in CAPABILITIES:
            raise UsageError(
                f"engine.compute_capabilities has {key_and_hint(capability, CAPABILITIES)}, TensorRT-RTX compiles for "
                f"{', '.join(CAPABILITIES)}: choose from those; the target tensorrt builds for the GPU it finds."
            )
    if len(set(engine.compute_capabilities)) != max(1, len(engine.compute_capabilities)):
        raise UsageError(
            f"engine.compute_capabilities is {list(engine.compute_capabilities)}; name one or more, each once."
        )
    _expect_choice("engine.cache_dtype", engine.cache_dtype, get_args(CacheDtype))
    _expect_choice("engine.experts", engine.experts, get_args(ExpertsForm))
    if recipe.target != "onnxruntime" and "attentions" in recipe.export.outputs:
        raise UsageError(
            f"export.outputs has attentions, which the target {recipe.target} does not compute; leave them out or use "
            "onnxruntime."
        )


def _expect_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {key_and_hint(value, known)}, expected one of {', '.join(known)}.")


def _resolve(name: str, folder: Path, children: tuple[str, ...]) -> dict[str, Any]:
    """The table of a recipe merged over the one it extends. Paths are relative to the extending file's folder."""
    path = folder / name
    is_path = name.endswith(".toml")
    identity = os.path.realpath(path) if is_path and "\0" not in name else name
    if identity in children:
        raise UsageError(f"recipe {name} extends itself ({' -> '.join((*children, identity))}); remove one `extends`.")
    if not is_path and name not in builtin_recipes():
        raise UsageError(
            f"recipe {key_and_hint(name, builtin_recipes())} does not exist; expected a path ending in .toml or one of "
            f"{', '.join(builtin_recipes())}."
        )
    builtin = importlib.resources.files("glm_export.recipes") / f"{name}.toml"
    try:
        data = read_text_file(path)[0] if is_path else builtin.read_bytes()
        table = tomllib.loads(data.decode("utf-8"))
    except InputError as error:
        raise UsageError(f"recipe {error}") from None
    except OSError as error:
        raise UsageError(f"recipe {path}: can not be read ({error.strerror}); check the path.") from None
    except ValueError as error:
        raise UsageError(f"recipe {path}: not valid TOML ({error}); correct it.") from None
    table.setdefault("name", Path(name).stem if is_path else name)
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise UsageError(f"recipe {name}: extends is {base!r}, expected the name or path of one recipe.")
    return _merge(_resolve(base, path.parent if is_path else folder, (*children, identity)), table)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, tables merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _build(cls: type[Any], table: object, prefix: str) -> object:
    """Makes a recipe dataclass from a table, strictly."""
    if not isinstance(table, Mapping):
        raise UsageError(f"{prefix.rstrip('.')} is {table!r}, expected a table.")
    known = {field.name: str(field.type) for field in fields(cls)}
    spellings = [*known, *ALIASES, *ROPE_TABLES] if cls is Glm4MoeConfig else [*known]
    unknown = [key for key in table if key not in spellings]
    if unknown:
        hints = ", ".join(f"{prefix}{key_and_hint(key, spellings)}" for key in unknown)
        raise UsageError(f"unknown {plural('key', unknown)} {hints}; correct or remove it.")
    if cls is Glm4MoeConfig:
        return Glm4MoeConfig.from_dict({"model_type": MODEL_TYPE, **table}, source="[model]")
    values: dict[str, object] = {}
    for key, value in table.items():
        nested = _TABLES.get(key)
        if cls is Recipe and nested is not None:
            values[key] = None if value is None else _build(nested, value, f"{prefix}{key}.")
        else:
            kind = "str" if known[key] in _TEXTS else known[key]
            values[key] = check_type(f"{prefix}{key}", value, kind)
    return cls(**values)
