import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import contract_of

from glm_export.runtime.contract import OPTIONAL_OUTPUTS
from glm_export.runtime.errors import GlmExportError, InputError, IntegrityError
from glm_export.runtime.manifest import FileRecord, Manifest

GOOD = Manifest(
    name="tiny",
    precision="bf16",
    contract=contract_of("bf16", outputs=("hidden_states", "attentions")),
    recipe={"name": "tiny", "layers": 2, "nested": {"list": [1, 2.5, None]}},
    source={"revision": "abc"},
    versions={"onnx": "1.22.0"},
    weights=True,
    eos_token_ids=(7, 8),
    max_position_embeddings=128,
    capacity=64,
    batch=2,
    files={"model.onnx": FileRecord(size=3, sha256="a" * 64), "engines/trt/plan": FileRecord(size=0, sha256="0" * 64)},
    engines={"trt": ("engines/trt/plan",)},
)


def test_round_trip(tmp_path: Path) -> None:
    GOOD.write(tmp_path)
    assert Manifest.read(tmp_path) == GOOD
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "fp8-head"])
@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize("inputs_embeds", [False, True])
def test_every_contract_round_trips(tmp_path: Path, precision: str, logits: str, inputs_embeds: bool) -> None:
    contract = contract_of(precision, logits=logits, inputs_embeds=inputs_embeds, outputs=OPTIONAL_OUTPUTS)
    manifest = dataclasses.replace(GOOD, precision=precision, contract=contract)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


def test_binding_tables_are_there_for_other_languages() -> None:
    bindings = GOOD.to_json()["bindings"]
    assert bindings["inputs"][0]["name"] == "input_ids"
    assert bindings["inputs"][3] == {
        "name": "k_cache.0",
        "shape": ["B", 2, "C", 8],
        "dtype": "bfloat16",
        "meaning": "rotated keys of layer 0",
        "in_place_of": None,
    }
    assert bindings["outputs"][1]["in_place_of"] == "k_cache.0"


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        del manifest[path[-1]]

    return change


RECORD = {"size": 1, "sha256": "b" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("schema_version"), "schema_version"),
        (put("schema_version", value="1"), "schema_version is str"),
        (put("schema_version", value=0), "schema_version is 0"),
        (put("schema_version", value=True), "schema_version is bool"),
        (drop("eos_token_ids"), "lacks eos_token_ids"),
        (put("extra", value=1), "unknown key 'extra'"),
        (put("name", value=None), "name is NoneType"),
        (put("precision", value="int4"), "precision is 'int4'"),
        (put("precision", value="fp16"), "compute_dtype"),
        (put("precision", value=[]), "precision is"),
        (put("recipe", value=[]), "recipe is list"),
        (put("versions", "onnx", value=1), "versions.onnx is int"),
        (put("weights", value=1), "weights is int"),
        (put("capacity", value=True), "capacity is bool"),
        (put("capacity", value=0), "capacity is 0"),
        (put("batch", value=1.0), "batch is float"),
        (put("eos_token_ids", value=["7"]), "eos_token_ids is str"),
        (put("eos_token_ids", value=[61]), "outside 0..60"),
        (put("contract", value={}), "contract lacks"),
        (put("contract", "extra", value=1), "unknown key 'extra'"),
        (put("contract", "head_dim", value=-1), "head_dim is -1"),
        (put("contract", "logits", value="some"), "contract.logits"),
        (put("contract", "outputs", value=["attentions", "hidden_states"]), "in order"),
        (put("contract", "outputs", value=[[]]), "in order"),
        (put("contract", "first_k_dense_replace", value=-1), "negative"),
        (put("contract", "num_hidden_layers", value=1), "bindings are not"),
        (put("bindings", "inputs", 1, "shape", value=["B", "S"]), "bindings are not"),
        (put("files", "model.onnx", "size", value=-1), "can not be right"),
        (put("files", "model.onnx", "sha256", value="A" * 64), "can not be right"),
        (put("files", "model.onnx", "mode", value=7), "unknown key 'mode'"),
        *(
            (put("files", path, value=RECORD), "not a plain path")
            for path in ("../x", "/x", "a\\b", "a\0", "", "a/./b")
        ),
        (put("files", "manifest.json", value=RECORD), "not a plain path"),
        (put("engines", "trt", value="plan"), "engines.trt is str"),
        (put("engines", "trt", value=["other"]), "'other' of trt is not listed"),
        (put("engines", "trt", value=[[]]), "not listed"),
        (put("recipe", value={"a": 1}), "its sha256 is not that of its content"),
        (put("source", value={"path": "elsewhere"}), "its sha256 is not that of its content"),
    ],
)
def test_damage_is_refused_with_one_sentence(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    manifest = json.loads(json.dumps(GOOD.to_json()))
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="is damaged") as raised:
        Manifest.read(tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "the manifest is list"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ('{"schema_version": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema_version": ' + "9" * 5000 + "}", "digits"),
        ('{"name": "\udcff"}', "utf-8"),
        ("truncated", None),
    ],
)
def test_text_that_is_no_manifest(tmp_path: Path, text: str, message: str | None) -> None:
    if text == "truncated":
        text, message = json.dumps(GOOD.to_json())[:-20], "Unterminated"
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(IntegrityError, match=message):
        Manifest.read(tmp_path)


def test_newer_schema_asks_for_a_newer_program(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 3, "anything": "else"}')
    with pytest.raises(InputError, match=r"has schema 3.*install a newer one"):
        Manifest.read(tmp_path)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        Manifest.read(tmp_path)
    with pytest.raises(InputError, match="is not a directory"):
        Manifest.read(tmp_path / "absent")


def test_manifest_that_is_a_link_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="symbolic link"):
        Manifest.read(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(IntegrityError, match="larger than 16 MiB"):
        Manifest.read(tmp_path)


def test_errors_have_the_documented_exit_codes() -> None:
    assert (InputError.exit_code, IntegrityError.exit_code) == (3, 8)
    assert issubclass(InputError, GlmExportError)
