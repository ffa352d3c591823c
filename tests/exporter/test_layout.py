import pytest
import torch
import transformers

from glm_export.exporter.layout import expert_parts, groups, layer_index, mtp_parameters, parameters, parts
from glm_export.exporter.recipe import load_recipe

TINY = load_recipe("tiny").model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_qk_norm": False, "attention_bias": False},
        {"first_k_dense_replace": 0, "n_shared_experts": 2},
        {"first_k_dense_replace": 4, "head_dim": 32},
    ],
)
def test_is_the_state_dict_of_transformers(overrides):
    config = load_recipe("tiny", {f"model.{key}": value for key, value in overrides.items()}).model
    with torch.device("meta"):
        model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**config.to_hf_dict()))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: parameter.shape for name, parameter in parameters(config).items()} == theirs


@pytest.mark.parametrize(("recipe", "billions"), [("glm-4.5-air-fp8", 106.85), ("glm-4.7-bf16", 352.80)])
def test_counts_of_released_models(recipe, billions):
    config = load_recipe(recipe).model
    assert sum(parameter.numel for parameter in parameters(config).values()) / 1e9 == pytest.approx(billions, abs=5e-3)


def test_neighbours():
    names = list(parameters(TINY))
    for i in range(TINY.num_hidden_layers):
        for suffix in ("weight", "bias"):
            at = names.index(f"model.layers.{i}.self_attn.q_proj.{suffix}")
            assert [name.split(".")[-2] for name in names[at : at + 3]] == ["q_proj", "k_proj", "v_proj"]
    for gate in [name for name in names if name.endswith("gate_proj.weight")]:
        assert names[names.index(gate) + 1] == gate.replace("gate_proj", "up_proj")


def test_groups_partition_the_parameters_in_order():
    found = groups(TINY)
    assert list(found) == ["embed", "layer-000", "layer-001", "layer-002", "layer-003", "head"]
    assert [parameter.name for parameter in found["head"]] == ["model.norm.weight", "lm_head.weight"]
    assert [parameter.name for members in found.values() for parameter in members] == list(parameters(TINY))


def test_parts():
    found = parameters(TINY)
    gate_up = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert gate_up.shape == (8, 64, 64)
    assert expert_parts(gate_up, 3) == {
        "model.layers.1.mlp.experts.3.gate_proj.weight": (32, 64),
        "model.layers.1.mlp.experts.3.up_proj.weight": (32, 64),
    }
    assert len(parts(gate_up)) == 16
    down = found["model.layers.1.mlp.experts.down_proj"]
    assert list(parts(down).items())[7] == ("model.layers.1.mlp.experts.7.down_proj.weight", (64, 32))
    norm = found["model.norm.weight"]
    assert parts(norm) == {norm.name: norm.shape}


def test_mtp_layer_is_a_moe_layer_with_four_more_tensors():
    names = set(mtp_parameters(TINY))
    moe = {name.replace("layers.3.", "layers.4.") for name in parameters(TINY) if ".layers.3." in name}
    assert names - moe == {
        f"model.layers.4.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    }
    assert moe - names == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.gate.weight", 12),
        ("model.layers.0.x", 0),
        ("model.layers.07.x", None),
        ("model.layers.+7.x", None),
        ("model.layers.٣.x", None),
        ("model.layers..x", None),
        ("model.norm.weight", None),
    ],
)
def test_layer_index(name, expected):
    assert layer_index(name) == expected
