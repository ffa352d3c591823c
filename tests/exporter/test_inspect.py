import json
import shutil
from pathlib import Path

import pytest
from cli_tools import bundle, call

from glm_export.exporter.inspect import KINDS, _parameters, inspect_bundle, kind_of_weight
from glm_export.exporter.layout import parameters
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.storage import stored_tensors
from glm_export.runtime.bundle import Bundle


def test_every_weight_has_its_kind() -> None:
    layer = "model.layers.3."
    expected = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "lm_head",
        "model.norm.weight": "norms",
        f"{layer}input_layernorm.weight": "norms",
        f"{layer}self_attn.q_norm.weight": "norms",
        f"{layer}self_attn.k_proj.weight": "attention linears",
        f"{layer}self_attn.k_proj.bias": "biases",
        f"{layer}self_attn.k_proj.weight_scale": "scales",
        f"{layer}mlp.gate_proj.weight": "dense MLP",
        f"{layer}mlp.gate.weight": "router",
        f"{layer}mlp.gate.e_score_correction_bias": "router",
        f"{layer}mlp.experts.gate_up_proj": "routed experts",
        f"{layer}mlp.experts.down_proj_scale": "scales",
        f"{layer}mlp.shared_experts.up_proj.weight": "shared experts",
    }
    assert {name: kind_of_weight(name) for name in expected} == expected


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_sizes_are_those_of_the_layout(precision: str) -> None:
    model = load_recipe("tiny").model
    assert model is not None
    found = inspect_bundle(Bundle.open(bundle(precision)))
    every = parameters(model).values()
    stored = [tensor for parameter in every for tensor in stored_tensors(parameter, precision)]
    expected = dict.fromkeys(KINDS, 0)
    for tensor in stored:
        expected[kind_of_weight(tensor.name)] += tensor.nbytes
    assert found["weight_bytes"] == expected
    assert (found["weight_bytes"]["scales"] > 0) == (precision == "fp8")
    assert found["parameters"]["total"] == sum(parameter.numel for parameter in every)
    assert found["kv_bytes_per_token"] == 2 * 4 * 2 * 16 * (4 if precision == "fp32" else 2)


def test_active_parameters_of_air() -> None:
    model = load_recipe("glm-4.5-air-fp8").model
    assert model is not None
    counts = _parameters(model)
    assert 105e9 < counts["total"] < 108e9  # 106B-A12B
    assert 11e9 < counts["active"] < 14e9


def test_json() -> None:
    called = call("inspect", bundle("fp8"), "--json")
    assert (called.code, called.err) == (0, "")
    found = json.loads(called.out)
    manifest = json.loads((bundle("fp8") / "manifest.json").read_text())
    for key in ("bindings", "engines", "files", "source", "versions", "recipe", "precision", "capacity", "batch"):
        assert found[key] == manifest[key], key
    assert found["total_bytes"] == sum(file["size"] for file in manifest["files"].values())
    assert found["nodes"]["glm::MoERouter"] == 3
    assert found["nodes"]["glm::CachedAttention"] == 4
    assert found["opset"] == {"onnx": 24, "glm": 1}
    assert found["config"] == json.loads((bundle("fp8") / "config.json").read_text())


def test_text() -> None:
    called = call("inspect", bundle("fp8"))
    assert (called.code, called.err) == (0, "")
    lines = called.out.splitlines()
    assert lines[0].startswith(f"{bundle('fp8')}: tiny in fp8, ")
    assert "  k_cache.0..3  bfloat16 [B,2,C,16]" in lines
    assert "weights (400 kB)" in lines
    assert any(line.startswith("  weights/layer-003.safetensors") for line in lines)
    assert any(line.split() == ["runtime.capacity", "128"] for line in lines)
    assert max(map(len, lines)) < 200


def test_a_damaged_graph_is_not_read(tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle("fp8"), tmp_path / "bundle"))
    (path / "model.onnx").write_bytes(b"\0" * (path / "model.onnx").stat().st_size)
    assert call("inspect", path).code == 8
