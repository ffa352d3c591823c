import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from toy import record_engine, write_bundle, write_engine

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import EngineInfo
from glm_export.runtime.errors import InputError, IntegrityError

TARGET = "tensorrt-rtx"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "toy")


def rewrite(directory: Path, text: str) -> None:
    """Replaces engine.json, with a manifest that says so."""
    (directory / f"engines/{TARGET}/engine.json").write_text(text)
    record_engine(directory, TARGET)


@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_reads_what_it_wrote(directory: Path, gpu: str | None) -> None:
    written = write_engine(directory, TARGET, gpu=gpu)
    assert EngineInfo.read(Bundle.open(directory), TARGET) == written
    text = (directory / f"engines/{TARGET}/engine.json").read_text()
    assert json.loads(text) == dataclasses.asdict(written) | {"compute_capabilities": ["8.9", "12.0"]}


def test_bundle_without_an_engine(directory: Path) -> None:
    with pytest.raises(InputError, match=r"has no engine for tensorrt-rtx: .* `glm-export engine .* --target tensorrt"):
        EngineInfo.read(Bundle.open(directory), TARGET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "tensorrt"}, "target is tensorrt, expected tensorrt-rtx"),
        ({"target": "cuda"}, "target is 'cuda', expected one of tensorrt, tensorrt-rtx"),
        ({"library_version": 11}, "library_version is int, expected str"),
        ({"compute_capabilities": []}, "compute_capabilities is"),
        ({"compute_capabilities": ["89"]}, r"compute_capabilities is \['89'\], expected some like 8.9"),
        ({"compute_capabilities": [8.9]}, "compute_capabilities is"),
        ({"gpu": 3}, "gpu is int, expected str"),
        ({"compute_dtype": "float8_e4m3fn"}, "compute_dtype is 'float8_e4m3fn', expected one of float32"),
        ({"cache_dtype": "int8"}, "cache_dtype is 'int8'"),
        ({"capacity": 0}, "capacity is 0, expected 1 or more"),
        ({"batch": True}, "batch is bool, expected int"),
        ({"prefill": 2.5}, "prefill is float"),
        ({"graph_sha256": "0" * 63}, "graph_sha256 can not be right"),
        ({"plan_bytes": 3}, r"plan_bytes is 3, engines/tensorrt-rtx/model\.plan has"),
        ({"layers": {"attention": -1}}, r"layers\.attention is negative"),
        ({"layers": []}, "layers is list"),
        ({"build_seconds": -0.5}, "build_seconds is -0.5"),
        ({"build_seconds": "1"}, "build_seconds is str"),
        ({"build_peak_bytes": None}, "build_peak_bytes is NoneType"),
        ({"surprise": 1}, "the engine has the unknown key 'surprise'"),
    ],
)
def test_damaged_values(directory: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(directory, json.dumps(write_engine(directory, TARGET).to_json() | changes))
    with pytest.raises(IntegrityError, match=rf"engine\.json is damaged \({message}.*build the engine again") as raised:
        EngineInfo.read(Bundle.open(directory), TARGET)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineInfo)])
def test_missing_fields(directory: Path, field: str) -> None:
    value = write_engine(directory, TARGET).to_json()
    del value[field]
    rewrite(directory, json.dumps(value))
    with pytest.raises(IntegrityError, match=f"the engine lacks {field}"):
        EngineInfo.read(Bundle.open(directory), TARGET)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "the engine is list, expected dict"),
        ('{"target": 1, "target": 2}', "the key 'target' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        (" " * (1 << 20) + "{}", "larger than 1 MiB"),
        ('{"build_seconds": NaN}', "NaN is not JSON"),
    ],
)
def test_text_that_is_no_engine(directory: Path, text: str, message: str) -> None:
    write_engine(directory, TARGET)
    rewrite(directory, text)
    with pytest.raises(IntegrityError, match=message):
        EngineInfo.read(Bundle.open(directory), TARGET)


def test_changed_after_the_build(directory: Path) -> None:
    write_engine(directory, TARGET)
    path = directory / f"engines/{TARGET}/engine.json"
    bundle = Bundle.open(directory)
    path.write_text(path.read_text().replace('"capacity": 32', '"capacity": 64'))
    with pytest.raises(IntegrityError, match=r"engine\.json has sha256 .*, the manifest says"):
        EngineInfo.read(bundle, TARGET)


def test_plan_that_is_gone(directory: Path) -> None:
    write_engine(directory, TARGET)
    bundle = Bundle.open(directory)
    (directory / f"engines/{TARGET}/model.plan").unlink()
    with pytest.raises(IntegrityError, match=r"model\.plan is missing"):
        EngineInfo.read(bundle, TARGET)
