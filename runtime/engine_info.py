"""engines/<target>/engine.json: what an engine was built for, so that it is refused where it can not run.

Beside it lies model.plan, the engine itself. A plan is native code to the library that loads it: whoever opens one
checks its hash and what is written here first.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import InputError, IntegrityError
from glm_export.runtime.files import FileRecord, write_text_durably
from glm_export.runtime.strict_json import exact, one_of, parse_json, positive, typed

ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
"""The targets whose engine is a plan in the bundle."""
ENGINE_NAME = "engine.json"
PLAN_NAME = "model.plan"
CACHE_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")

_LARGEST_INFO = 1 << 20
_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """Everything an engine says about itself."""

    target: str
    """tensorrt or tensorrt-rtx."""
    library_version: str
    """Of the library that built the plan; the one that loads it must be the same."""
    compute_capabilities: tuple[str, ...]
    """The GPUs it runs on, such as 8.9 and 12.0."""
    gpu: str | None
    """The GPU it was built on; None for one that was built without."""
    compute_dtype: str
    """numpy's name of the dtype of activations."""
    cache_dtype: str
    """numpy's name of the dtype of the KV caches."""
    capacity: int
    """Tokens per row, exactly."""
    batch: int
    """Most rows."""
    prefill: int
    """Most new tokens per row in one step."""
    graph_sha256: str
    """Of the model.onnx it was built from."""
    plan_bytes: int
    layers: Mapping[str, int]
    """How many layers there are of each kind that must be there: plugins by name, kv_cache_update, attention."""
    build_seconds: float
    build_peak_bytes: int
    """Most host memory that the build held."""

    @classmethod
    def read(cls, bundle: Bundle, target: str) -> EngineInfo:
        """Reads the engine.json of a target from a bundle, after checking its hash.

        Raises:
            InputError: the bundle has no engine for the target.
            IntegrityError: engine.json is damaged, or of another engine than the one that lies there.
        """
        if target not in bundle.manifest.engines:
            raise InputError(
                f"{bundle.directory} has no engine for {target}: add one with "
                f"`glm-export engine {bundle.directory} --target {target}`."
            )
        path = bundle.file(engine_path(target, ENGINE_NAME))
        plan = engine_path(target, PLAN_NAME)
        bundle.file(plan, hashed=False)
        try:
            if path.stat().st_size > _LARGEST_INFO:
                raise ValueError(f"it is larger than {_LARGEST_INFO >> 20} MiB")
            info = cls.from_json(parse_json(path.read_bytes()))
            if info.target != target:
                raise ValueError(f"target is {info.target}, expected {target}")
            if info.plan_bytes != bundle.manifest.files[plan].size:
                raise ValueError(f"plan_bytes is {info.plan_bytes}, {plan} has {bundle.manifest.files[plan].size}")
        except ValueError as error:
            raise IntegrityError(
                f"{path} is damaged ({error}): copy the bundle again, or build the engine again."
            ) from None
        return info

    def write(self, directory: Path) -> FileRecord:
        """Writes `directory/engine.json` in one durable step."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_text_durably(directory / ENGINE_NAME, text)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return dataclasses.asdict(self) | {
            "compute_capabilities": list(self.compute_capabilities),
            "layers": dict(sorted(self.layers.items())),
        }

    @classmethod
    def from_json(cls, value: object) -> EngineInfo:
        """The inverse of `to_json`.

        Raises:
            ValueError: something is wrong; the message says what.
        """
        fields = exact(value, {field.name for field in dataclasses.fields(cls)}, "the engine")
        capabilities = typed(fields["compute_capabilities"], list, "compute_capabilities")
        if not capabilities or not all(isinstance(item, str) and _CAPABILITY.fullmatch(item) for item in capabilities):
            raise ValueError(f"compute_capabilities is {capabilities}, expected some like 8.9")
        if not _SHA256.fullmatch(typed(fields["graph_sha256"], str, "graph_sha256")):
            raise ValueError("graph_sha256 can not be right")
        layers = typed(fields["layers"], dict, "layers")
        for kind, count in layers.items():
            if typed(count, int, f"layers.{kind}") < 0:
                raise ValueError(f"layers.{kind} is negative")
        seconds = fields["build_seconds"]
        if isinstance(seconds, int) and not isinstance(seconds, bool):
            seconds = float(seconds)  # JSON has one kind of number
        if not typed(seconds, float, "build_seconds") >= 0:
            raise ValueError(f"build_seconds is {seconds}, expected 0 or more")
        return cls(
            target=one_of(fields["target"], ENGINE_TARGETS, "target"),
            library_version=typed(fields["library_version"], str, "library_version"),
            compute_capabilities=tuple(capabilities),
            gpu=None if fields["gpu"] is None else typed(fields["gpu"], str, "gpu"),
            compute_dtype=one_of(fields["compute_dtype"], CACHE_DTYPES[:3], "compute_dtype"),
            cache_dtype=one_of(fields["cache_dtype"], CACHE_DTYPES, "cache_dtype"),
            capacity=positive(fields["capacity"], "capacity"),
            batch=positive(fields["batch"], "batch"),
            prefill=positive(fields["prefill"], "prefill"),
            graph_sha256=fields["graph_sha256"],
            plan_bytes=positive(fields["plan_bytes"], "plan_bytes"),
            layers=layers,
            build_seconds=seconds,
            build_peak_bytes=positive(fields["build_peak_bytes"], "build_peak_bytes"),
        )


def engine_path(target: str, name: str) -> str:
    """Where a file of a target's engine lies, relative to the bundle."""
    return f"engines/{target}/{name}"
