"""How an op is described: the single source that its torch op, ONNX bodies and kernels are checked against."""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "glm"
VERSION = 1

COMPUTE = ("float32", "bfloat16", "float16")
FLOAT32 = ("float32",)
FP8 = ("float8_e4m3fn",)
INT32 = ("int32",)
INT64 = ("int64",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input or output of an op."""

    name: str
    shape: str
    """Letters of the project's legend, comma separated; `...` stands for any leading dimensions."""
    dtypes: tuple[str, ...]
    meaning: str
    optional: bool = False
    in_place_of: str | None = None
    """The input whose memory this output has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribute:
    """A number fixed per node."""

    name: str
    type: type[int] | type[float]
    meaning: str
    letter: str | None = None
    """The shape letter whose size it is, where no input has that letter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpSchema:
    """An op of the `glm` domain."""

    name: str
    torch_name: str | None
    """None for an op that only occurs in graphs lowered for a target, and is never traced."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...] = ()
    doc: str
