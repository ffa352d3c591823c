import dataclasses
import json

import pytest

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.recipe import (
    Export,
    Recipe,
    Runtime,
    Validate,
    builtin_recipes,
    check_model,
    load_recipe,
    parse_setting,
)
from glm_export.runtime.errors import InputError, UsageError

MODELS = ("glm-4.5", "glm-4.5-air", "glm-4.6", "glm-4.7")


def write(path, text):
    path.write_text(text)
    return path


def test_builtin_recipes_are_one_per_model_and_precision():
    assert set(builtin_recipes()) == {
        "tiny",
        *(f"{model}-{precision}" for model in MODELS for precision in ("fp8", "bf16")),
    }
    for name in builtin_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.precision == ("fp8" if name == "tiny" else name.rpartition("-")[2])
        assert recipe.model is not None


# layers, hidden, dense width, dense layers, experts, expert width, scaling, qk norm, positions
RELEASED = {
    "glm-4.5": (92, 5120, 12288, 3, 160, 1536, 2.5, True, 131072),
    "glm-4.5-air": (46, 4096, 10944, 1, 128, 1408, 1.0, False, 131072),
    "glm-4.6": (92, 5120, 12288, 3, 160, 1536, 2.5, True, 202752),
    "glm-4.7": (92, 5120, 12288, 3, 160, 1536, 2.5, True, 202752),
}


@pytest.mark.parametrize("model", MODELS)
def test_released_models(model):
    c = load_recipe(f"{model}-fp8").model
    assert RELEASED[model] == (
        *(c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.first_k_dense_replace, c.n_routed_experts),
        *(c.moe_intermediate_size, c.routed_scaling_factor, c.use_qk_norm, c.max_position_embeddings),
    )
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rotary_dim) == (96, 8, 128, 64)
    assert (c.num_experts_per_tok, c.n_shared_experts, c.n_group, c.topk_group) == (8, 1, 1, 1)
    assert (c.rope_theta, c.rms_norm_eps, c.vocab_size, c.num_nextn_predict_layers) == (1e6, 1e-5, 151552, 1)
    assert (c.attention_bias, c.norm_topk_prob, c.tie_word_embeddings) == (True, True, False)
    assert (c.eos_token_id, c.bos_token_id, c.pad_token_id) == ((151329, 151336, 151338), None, 151329)
    assert load_recipe(f"{model}-bf16").model == c


def test_tiny_keeps_every_branch_alive():
    c = load_recipe("tiny").model
    assert c.n_group > c.topk_group
    assert 0 < c.first_k_dense_replace < c.num_hidden_layers
    assert c.use_qk_norm
    assert c.attention_bias
    assert c.norm_topk_prob
    assert c.routed_scaling_factor != 1
    assert c.num_nextn_predict_layers == 1
    assert c.rotary_dim < c.head_dim
    assert c.num_key_value_groups > 1


@pytest.mark.parametrize("name", builtin_recipes())
def test_dict_round_trip(name):
    recipe = load_recipe(name, {"export.outputs": ["attentions"], "export.logits": "all"})
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_defaults():
    recipe = Recipe(name="x")
    assert (recipe.precision, recipe.target, recipe.model) == ("fp8", "onnxruntime", None)
    assert (recipe.export, recipe.runtime, recipe.validate) == (Export(), Runtime(), Validate())


def test_overrides():
    recipe = load_recipe("tiny", {"runtime.capacity": 256, "precision": "bf16", "model.routed_scaling_factor": 1})
    assert recipe.runtime == Runtime(capacity=256, batch=4)
    assert recipe.precision == "bf16"
    assert recipe.model == dataclasses.replace(load_recipe("tiny").model, routed_scaling_factor=1.0)


def test_extends_relative_paths_and_builtins(tmp_path):
    (tmp_path / "below").mkdir()
    write(tmp_path / "base.toml", 'extends = "tiny"\nname = "mine"\nprecision = "fp32"\n[runtime]\ncapacity = 64\n')
    child = write(tmp_path / "below/child.toml", 'extends = "../base.toml"\n[runtime]\nbatch = 2\n')
    recipe = load_recipe(child)
    assert recipe.name == "child"
    assert recipe.precision == "fp32"
    assert recipe.runtime == Runtime(capacity=64, batch=2)
    assert recipe.validate == load_recipe("tiny").validate
    assert recipe.model == load_recipe("tiny").model
    assert load_recipe(tmp_path / "base.toml").name == "mine"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("precison = 'fp8'", "unknown key 'precison' (did you mean 'precision'?)"),
        ("[runtime]\ncapcity = 1", "unknown key runtime.'capcity' (did you mean 'capacity'?)"),
        ("[validate]\nsteps = '16'", "validate.steps is '16', expected an integer"),
        ("[validate]\nsteps = true", "validate.steps is True, expected an integer"),
        ("[validate]\nsteps = 0", "validate.steps is 0, expected a positive size"),
        ("[validate]\nsteps = 5000", "more than runtime.capacity 4096"),
        ("[runtime]\nbatch = -1", "runtime.batch is -1"),
        ("runtime = 4", "runtime is 4, expected a table"),
        ("precision = 'int4'", "expected one of fp32, bf16, fp16, fp8"),
        ("precision = 8", "precision is 8, expected a string"),
        ("target = 'tensorrt_rtx'", "did you mean 'tensorrt-rtx'?"),
        ("[export]\nlogits = 'first'", "export.logits is 'first', expected one of last, all"),
        ("[export]\noutputs = ['router_logit']", "did you mean 'router_logits'?"),
        ("[export]\noutputs = 'attentions'", "export.outputs is 'attentions', expected a list"),
        ("[export]\ninputs_embeds = 1", "export.inputs_embeds is 1, expected true or false"),
        ("extends = 'tinny'", "'tinny' (did you mean 'tiny'?) does not exist"),
        ("extends = ['tiny']", "expected the name or path of one recipe"),
        ("extends = 'absent.toml'", "can not be read (No such file or directory)"),
        ("extends = 'recipe.toml'", "extends itself"),
        ("extends = 'tiny'\n[model]\nn_group = 3", "n_routed_experts 8 is not divisible by n_group 3"),
        ("extends = 'tiny'\n[model]\nhead_dims = 3", "unknown key model.'head_dims' (did you mean 'head_dim'?)"),
        ("[model]\nhidden_size = 64", "missing keys vocab_size"),
        ("precision = ", "not valid TOML"),
        ("precision = 'fp8'\nprecision = 'fp8'", "not valid TOML"),
        ("precision = 1979-05-27", "expected a string"),
    ],
)
def test_refuses_with_one_sentence(tmp_path, text, sentence):
    path = write(tmp_path / "recipe.toml", text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message
    assert message.endswith(".")


def test_refuses_binary_files_and_wrong_overrides(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"\xff\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_recipe(tmp_path / "x.toml")
    with pytest.raises(UsageError, match=r"unknown key runtime.'batches' \(did you mean 'batch'"):
        load_recipe("tiny", {"runtime.batches": 3})
    with pytest.raises(UsageError, match="runtime is 3, expected a table"):
        load_recipe("tiny", {"runtime": 3})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runtime.capacity=1024", ("runtime.capacity", 1024)),
        ("precision = bf16", ("precision", "bf16")),
        ("export.outputs=['attentions']", ("export.outputs", ["attentions"])),
        ("model.use_qk_norm=true", ("model.use_qk_norm", True)),
        ('target="tensorrt"', ("target", "tensorrt")),
        ("precision=a=b", ("precision", "a=b")),
    ],
)
def test_parse_setting(text, expected):
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["runtime.capacity", "=3", "runtime.=3", ""])
def test_parse_setting_refuses(text):
    with pytest.raises(UsageError, match="not of the form"):
        parse_setting(text)


def test_check_model():
    recipe = load_recipe("tiny")
    config = dataclasses.replace(recipe.model, dtype="float32", use_cache=False)
    check_model(recipe, config)
    check_model(Recipe(name="any"), config)
    with pytest.raises(InputError) as caught:
        check_model(recipe, dataclasses.replace(config, head_dim=32, norm_topk_prob=False))
    assert "not the model of recipe tiny: head_dim is 32, the recipe has 16; norm_topk_prob is False" in str(
        caught.value
    )
    assert isinstance(recipe.model, Glm4MoeConfig)
