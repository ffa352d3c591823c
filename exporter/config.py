"""What config.json says about the model, read strictly.

`Glm4MoeConfig` has the fields of the transformers 5.23 class, names verbatim, but none of its traps: a field whose
default would change the numbers is required here. Whatever the rest of the project can not represent is refused when
the config is made, so that no later code has to ask again.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from glm_export.exporter.source.source_file import read_text_file
from glm_export.runtime import strict_json
from glm_export.runtime.contract import COMPUTE_DTYPES, OPTIONAL_OUTPUTS, Contract, LogitsMode
from glm_export.runtime.errors import InputError, UsageError

ARCHITECTURE = "Glm4MoeForCausalLM"
MODEL_TYPE = "glm4_moe"
DTYPES = ("bfloat16", "float16", "float32")

OTHER_MODELS = {
    "glm4_moe_lite": "GLM-4.7-Flash, which has multi-head latent attention",
    "glm4v_moe": "GLM-4.5V, a vision-language model",
    "glm4v_moe_text": "the text half of GLM-4.5V, which has three-dimensional RoPE",
    "glm4": "a dense GLM-4, which has no experts and interleaved RoPE",
    "glm": "a dense GLM, which has no experts",
    "chatglm": "ChatGLM, a dense model",
    "glm_moe_dsa": "GLM-5, which has sparse attention",
}

ALIASES = {
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
    "torch_dtype": "dtype",
}

ROPE_TABLES = ("rope_parameters", "rope_scaling")  # new and old name
ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")

# What transformers writes into config.json and no forward pass reads, and what is looked at elsewhere.
BOOKKEEPING_KEYS = (
    *("architectures", "model_type", "quantization_config", "transformers_version", "_name_or_path", "_commit_hash"),
    *("_attn_implementation", "_attn_implementation_autoset", "_experts_implementation", "tokenizer_class", "prefix"),
    *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "problem_type"),
    *("id2label", "label2id", "task_specific_params", "finetuning_task"),
)

_LARGEST = {"num_hidden_layers": 4096, "n_routed_experts": 4096}  # a bound on the work a hostile config can ask for
_LISTED = 10
_LONGEST_KEY = 100  # of those that are shown and compared with the known ones
_SHORT = reprlib.Repr()
_SHORT.maxstring = _LONGEST_KEY
_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Glm4MoeConfig:
    """The architecture of one checkpoint. Making one checks it.

    Raises:
        InputError: a field has the wrong type or a value that this project does not support.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    attention_bias: bool
    use_qk_norm: bool
    moe_intermediate_size: int
    num_experts_per_tok: int
    n_shared_experts: int
    n_routed_experts: int
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    norm_topk_prob: bool
    num_nextn_predict_layers: int
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    # From here on nothing changes what the model computes: each stored tensor has its own dtype, the rest is training.
    dtype: str = "bfloat16"
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    use_cache: bool = True
    output_router_logits: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = check_type(field.name, getattr(self, field.name), str(field.type))
            object.__setattr__(self, field.name, value)
        _check(self)

    @property
    def rotary_dim(self) -> int:
        """How many leading elements of each head RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_key_value_groups(self) -> int:
        """Query heads per key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def moe_layers(self) -> range:
        """The indices of the layers with experts; those before are dense."""
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def mtp_layers(self) -> range:
        """The layer indices under which a checkpoint stores its multi-token-prediction layers."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def is_moe_layer(self, i: int) -> bool:
        """Whether layer `i` has experts."""
        return i >= self.first_k_dense_replace

    def with_layers(self, num_hidden_layers: int) -> Glm4MoeConfig:
        """The same model cut to its first layers.

        Raises:
            UsageError: not between 1 and the number of layers.
        """
        if not 1 <= num_hidden_layers <= self.num_hidden_layers:
            raise UsageError(f"can not keep {num_hidden_layers} of {self.num_hidden_layers} layers; choose at least 1.")
        dense = min(self.first_k_dense_replace, num_hidden_layers)
        return replace(self, num_hidden_layers=num_hidden_layers, first_k_dense_replace=dense)

    @classmethod
    def from_dict(
        cls, mapping: Mapping[str, Any], source: str = "config.json", ignore: Collection[str] = ()
    ) -> Glm4MoeConfig:
        """Reads the keys of a config.json, in old and new spellings.

        Args:
            mapping: the parsed file.
            source: what error messages call it.
            ignore: unknown keys to accept.

        Raises:
            InputError: another architecture, a missing, unknown or contradictory key, an unsupported value.
        """
        try:
            _check_architecture(mapping)
            table = _canonical(mapping)
            known = {field.name: field for field in fields(cls)}
            unknown = [
                key
                for key, value in table.items()
                if not (key in known or key in BOOKKEEPING_KEYS or key in ignore or value is None or value is False)
            ]
            if unknown:
                hints = ", ".join(key_and_hint(key, [*known, *ALIASES, *ROPE_TABLES]) for key in unknown[:_LISTED])
                more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
                raise InputError(
                    f"unknown {plural('key', unknown)} {hints}{more}; correct it, or, if it does not change what the "
                    f"model computes, accept it with --ignore-config-key {unknown[0][:_LONGEST_KEY]}."
                )
            given = {key: value for key, value in table.items() if key in known and value is not None}
            missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
            if missing:
                raise InputError(
                    f"missing {plural('key', missing)} {', '.join(missing)}; no default is safe (what transformers "
                    "assumes differs from every released model), so add what the model was trained with."
                )
            return cls(**given)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path, ignore: Collection[str] = ()) -> Glm4MoeConfig:
        """Reads a config.json file.

        Raises:
            InputError: unreadable, not JSON, or as `from_dict`.
        """
        path = Path(path)
        data, _ = read_text_file(path)
        return cls.from_dict(parse_json(data, str(path)), source=str(path), ignore=ignore)

    def to_hf_dict(self) -> dict[str, Any]:
        """A config.json that transformers loads and that `from_dict` reads back equal."""
        table: dict[str, Any] = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
        table |= {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ROPE_FIELDS}
        table["eos_token_id"] = list(self.eos_token_id) or None
        table["rope_parameters"] = {"rope_type": "default"} | {name: getattr(self, name) for name in ROPE_FIELDS}
        return table


def contract(
    config: Glm4MoeConfig,
    *,
    precision: str,
    logits: LogitsMode = "last",
    inputs_embeds: bool = False,
    outputs: Iterable[str] = (),
) -> Contract:
    """The bindings of an engine for this model.

    Raises:
        UsageError: unknown precision or optional output.
    """
    chosen = set(outputs)
    for name, known in [(precision, [*COMPUTE_DTYPES]), *((output, [*OPTIONAL_OUTPUTS]) for output in sorted(chosen))]:
        if name not in known:
            raise UsageError(f"{key_and_hint(name, known)} is not one of {', '.join(known)}; choose one of these.")
    return Contract(
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        n_routed_experts=config.n_routed_experts,
        first_k_dense_replace=config.first_k_dense_replace,
        compute_dtype=COMPUTE_DTYPES[precision],
        logits=logits,
        inputs_embeds=inputs_embeds,
        outputs=tuple(name for name in OPTIONAL_OUTPUTS if name in chosen),
    )


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """Parses a JSON object in which no key appears twice.

    Raises:
        InputError: not UTF-8, not JSON, not an object, nested too deeply, or a duplicate key.
    """
    try:
        table = strict_json.parse_json(data, constants=True)  # a NaN gets a sentence of its own where it matters
    except strict_json.DuplicateKeyError as error:
        raise InputError(f"{source}: {error} in one object; keep the right one.") from None
    except ValueError as error:
        raise InputError(f"{source}: not valid JSON ({error}); the file may be truncated, copy it again.") from None
    if not isinstance(table, dict):
        raise InputError(f"{source}: holds a JSON {type(table).__name__}, expected an object {{...}}.")
    return cast(dict[str, Any], table)


def check_type(name: str, value: object, kind: str) -> object:
    """Checks a value against a field's annotation, without guessing: true is no integer and "8" no number.

    Returns:
        The value; an integer given for a float becomes one, a list given for a tuple too.

    Raises:
        InputError: the wrong type, or not finite.
    """
    if kind.endswith(" | None"):
        return None if value is None else check_type(name, value, kind.removesuffix(" | None"))
    if kind.startswith("tuple["):
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} is {reprlib.repr(value)}, expected a list.")
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(check_type(f"{name}[{i}]", item, inner) for i, item in enumerate(value))
    if kind == "float" and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if type(value).__name__ != kind:
        raise InputError(f"{name} is {reprlib.repr(value)}, expected {_KINDS[kind]}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} is {value}, expected a finite number.")
    return value


def key_and_hint(key: str, known: Iterable[str]) -> str:
    """The key in quotes, with the known one that it resembles."""
    close = difflib.get_close_matches(key, list(known), n=1) if len(key) <= _LONGEST_KEY else []
    return _SHORT.repr(key) + (f" (did you mean {close[0]!r}?)" if close else "")


def plural(noun: str, things: Collection[object]) -> str:
    """The noun, with an s unless there is exactly one thing."""
    return noun if len(things) == 1 else noun + "s"


def _check_architecture(mapping: Mapping[str, Any]) -> None:
    model_type, architectures = mapping.get("model_type"), mapping.get("architectures")
    if model_type != MODEL_TYPE:
        what = f", {OTHER_MODELS[model_type]}" if isinstance(model_type, str) and model_type in OTHER_MODELS else ""
        raise InputError(
            f"model_type is {reprlib.repr(model_type)}{what}; expected {MODEL_TYPE!r} (GLM-4.5, 4.5-Air, 4.6 or 4.7)."
        )
    if architectures is not None and architectures != [ARCHITECTURE]:
        raise InputError(
            f"architectures is {reprlib.repr(architectures)}, expected [{ARCHITECTURE!r}]; use that class."
        )


def _canonical(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling for every field; the same thing said twice must be the same thing."""
    table: dict[str, Any] = {}

    def put(name: str, value: object, spelling: str) -> None:
        present = table.get(name)
        if present is not None and value is not None and present != value:
            raise InputError(
                f"{name} is {reprlib.repr(present)} but {spelling} says {reprlib.repr(value)}; "
                "they mean the same, keep the right one."
            )
        table[name] = present if value is None else value

    for key, value in mapping.items():
        if key not in ROPE_TABLES:
            put(ALIASES.get(key, key), value, key)
    for key in ROPE_TABLES:
        rope = mapping.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise InputError(f"{key} is {reprlib.repr(rope)}, expected an object.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        extra = [name for name in rope if name not in (*ROPE_FIELDS, "rope_type", "type")]
        if kind != "default" or extra:
            seen = f"{extra[0]!r}" if kind == "default" else f"rope_type {reprlib.repr(kind)}"
            raise InputError(f"{key} has {seen}; only the default RoPE, without scaling, is supported.")
        for name in ROPE_FIELDS:
            put(name, rope.get(name), f"{key}.{name}")
    if type(table.get("eos_token_id")) is int:
        table["eos_token_id"] = [table["eos_token_id"]]
    return table


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "moe_intermediate_size", "num_experts_per_tok"),
    *("n_shared_experts", "n_routed_experts", "n_group", "topk_group"),
)


def _expect(good: bool, seen: str, expected: str) -> None:
    if not good:
        raise InputError(f"{seen}, expected {expected}; correct the config.")


def _check(c: Glm4MoeConfig) -> None:
    for name in (*_SIZES, "first_k_dense_replace", "num_nextn_predict_layers"):
        low, high = int(name in _SIZES), _LARGEST.get(name, 2**31 - 1)
        _expect(low <= getattr(c, name) <= high, f"{name} is {reprlib.repr(getattr(c, name))}", f"{low} to {high}")
    for name in ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor"):
        _expect(getattr(c, name) > 0, f"{name} is {getattr(c, name)}", "a positive number")
    factor = c.partial_rotary_factor
    _expect(factor < 2**31, f"partial_rotary_factor is {factor}", "at most 1")
    _expect(c.hidden_act == "silu", f"hidden_act is {c.hidden_act!r}", "'silu'")
    _expect(c.dtype in DTYPES, f"dtype is {c.dtype!r}", f"one of {', '.join(DTYPES)}")
    heads = (
        f"num_attention_heads {c.num_attention_heads} does not divide by num_key_value_heads {c.num_key_value_heads}"
    )
    _expect(c.num_attention_heads % c.num_key_value_heads == 0, heads, "equally many query heads for each of these")
    rotary = f"head_dim {c.head_dim} * partial_rotary_factor {c.partial_rotary_factor} rotates {c.rotary_dim} elements"
    _expect(c.rotary_dim in range(2, c.head_dim + 1, 2), rotary, "an even number from 2 to head_dim")
    dense = f"first_k_dense_replace {c.first_k_dense_replace} is more than num_hidden_layers {c.num_hidden_layers}"
    _expect(c.first_k_dense_replace <= c.num_hidden_layers, dense, "at most as many dense layers as layers")
    _check_groups(c)
    for name, ids in (("eos", c.eos_token_id), ("bos", (c.bos_token_id,)), ("pad", (c.pad_token_id,))):
        for token in ids:
            good = token is None or 0 <= token < c.vocab_size
            _expect(
                good,
                f"{name}_token_id is {reprlib.repr(token)}",
                f"an id from 0 to vocab_size - 1 = {c.vocab_size - 1}",
            )


def _check_groups(c: Glm4MoeConfig) -> None:
    more = f"topk_group {c.topk_group} is more than n_group {c.n_group}"
    _expect(c.topk_group <= c.n_group, more, "to keep at most all groups")
    unequal = f"n_routed_experts {c.n_routed_experts} is not divisible by n_group {c.n_group}"
    _expect(c.n_routed_experts % c.n_group == 0, unequal, "groups of equal size")
    size = c.n_routed_experts // c.n_group
    small = f"n_routed_experts {c.n_routed_experts} in n_group {c.n_group} groups leaves {size} expert per group"
    _expect(c.n_group == 1 or size >= 2, small, "at least 2, because a group is scored by its best two")
    left = c.topk_group * size
    few = f"num_experts_per_tok {c.num_experts_per_tok} is more than the {left} experts that topk_group leaves"
    _expect(c.num_experts_per_tok <= left, few, "at most that many")
