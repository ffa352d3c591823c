import dataclasses
import json
import subprocess
import sys

import pytest
import transformers

from glm_export.exporter.config import Glm4MoeConfig, contract
from glm_export.runtime.errors import InputError, UsageError

# GLM-4.5-Air as released: rope and dtype in their old spellings.
AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}

REMOVED = object()


def changed(**changes):
    table = AIR | changes
    return {key: value for key, value in table.items() if value is not REMOVED}


def test_reads_a_released_config():
    config = Glm4MoeConfig.from_dict(AIR)
    assert config.rope_theta == 1e6
    assert type(config.rope_theta) is float
    assert config.dtype == "bfloat16"
    assert config.eos_token_id == (151329, 151336, 151338)
    assert config.bos_token_id is None
    assert config.rotary_dim == 64
    assert config.num_key_value_groups == 12
    assert config.moe_layers == range(1, 46)
    assert config.mtp_layers == range(46, 47)
    assert [config.is_moe_layer(i) for i in (0, 1, 46)] == [False, True, True]


def test_has_every_field_of_the_transformers_class():
    ours = {field.name for field in dataclasses.fields(Glm4MoeConfig)}
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    theirs = {field.name for field in dataclasses.fields(transformers.Glm4MoeConfig)} - base
    theirs |= {"vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"}
    theirs = (theirs - {"num_mtp_layers", "rope_parameters"}) | {"num_nextn_predict_layers"}
    assert theirs - ours == set()
    assert ours - theirs == {"head_dim", "rope_theta", "partial_rotary_factor"}


def test_transformers_reads_what_we_write_and_back():
    config = Glm4MoeConfig.from_dict(AIR)
    theirs = transformers.Glm4MoeConfig(**config.to_hf_dict())
    for field in dataclasses.fields(config):
        ours = getattr(config, field.name)
        if field.name in ("rope_theta", "partial_rotary_factor"):
            assert theirs.rope_parameters[field.name] == ours
        elif field.name == "eos_token_id":
            assert tuple(theirs.eos_token_id) == ours
        elif field.name == "dtype":
            assert str(theirs.dtype).removeprefix("torch.") == ours
        else:
            assert getattr(theirs, field.name) == ours, field.name
    assert Glm4MoeConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False))) == config
    assert Glm4MoeConfig.from_dict(config.to_hf_dict()) == config
    assert Glm4MoeConfig.from_dict(dataclasses.asdict(config) | {"model_type": "glm4_moe"}) == config


def test_old_and_new_spellings_are_equal():
    config = Glm4MoeConfig.from_dict(AIR)
    new = changed(
        rope_theta=REMOVED,
        partial_rotary_factor=REMOVED,
        rope_scaling=REMOVED,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        torch_dtype=REMOVED,
        dtype="bfloat16",
        n_routed_experts=REMOVED,
        num_local_experts=128,
        num_nextn_predict_layers=REMOVED,
        num_mtp_layers=1,
    )
    assert Glm4MoeConfig.from_dict(new) == config
    assert Glm4MoeConfig.from_dict(AIR | {"num_local_experts": 128, "rope_scaling": {"type": "default"}}) == config
    assert Glm4MoeConfig.from_dict(AIR | {"eos_token_id": 7}).eos_token_id == (7,)
    assert Glm4MoeConfig.from_dict(AIR | {"eos_token_id": None}).eos_token_id == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "glm4_moe_lite"}, "GLM-4.7-Flash"),
        ({"model_type": "glm4v_moe"}, "GLM-4.5V, a vision-language model"),
        ({"model_type": "glm4"}, "a dense GLM-4"),
        ({"model_type": "llama"}, "model_type is 'llama'; expected 'glm4_moe'"),
        ({"model_type": REMOVED}, "model_type is None"),
        ({"model_type": ["glm4_moe"]}, "model_type is ['glm4_moe']"),
        ({"architectures": ["Glm4MoeLiteForCausalLM"]}, "expected ['Glm4MoeForCausalLM']"),
        ({"head_dim": REMOVED}, "missing key head_dim; no default is safe"),
        ({"head_dim": None}, "missing key head_dim"),
        ({"rope_theta": REMOVED, "use_qk_norm": REMOVED}, "missing keys rope_theta, use_qk_norm"),
        *(
            ({name: REMOVED}, f"missing key {name}")
            for name in ("hidden_size", "attention_bias", "routed_scaling_factor", "n_group", "partial_rotary_factor")
        ),
        ({"num_key_value_heads": 7}, "num_attention_heads 96 does not divide by num_key_value_heads 7"),
        ({"head_dim": 42}, "rotates 21 elements, expected an even number"),
        ({"partial_rotary_factor": 1.5}, "rotates 192 elements"),
        ({"partial_rotary_factor": 0.001}, "rotates 0 elements"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling has rope_type 'yarn'; only the default"),
        ({"rope_parameters": {"mrope_section": [8, 12, 12]}}, "rope_parameters has 'mrope_section'"),
        ({"rope_parameters": "default"}, "expected an object"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "but rope_parameters.rope_theta says 10000.0"),
        ({"topk_group": 2}, "topk_group 2 is more than n_group 1"),
        ({"n_group": 3}, "n_routed_experts 128 is not divisible by n_group 3"),
        ({"n_group": 128, "topk_group": 16}, "leaves 1 expert per group, expected at least 2"),
        ({"n_group": 32, "topk_group": 1}, "num_experts_per_tok 8 is more than the 4 experts"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"hidden_size": 0}, "hidden_size is 0, expected 1 to"),
        ({"moe_intermediate_size": -1408}, "moe_intermediate_size is -1408"),
        ({"vocab_size": 10**400}, "vocab_size is 1000"),
        ({"num_hidden_layers": 10**6}, "expected 1 to 4096"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected an integer"),
        ({"num_hidden_layers": 46.0}, "num_hidden_layers is 46.0, expected an integer"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', expected an integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, expected a finite number"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor is inf"),
        ({"routed_scaling_factor": 10**400}, "expected a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0, expected a positive number"),
        ({"first_k_dense_replace": 47}, "first_k_dense_replace 47 is more than num_hidden_layers 46"),
        ({"eos_token_id": [151552]}, "eos_token_id is 151552, expected an id from 0 to vocab_size - 1 = 151551"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected a list"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"num_local_experts": 64}, "n_routed_experts is 128 but num_local_experts says 64"),
        ({"num_mtp_layers": 2}, "num_nextn_predict_layers is 1 but num_mtp_layers says 2"),
        ({"dtype": "float16"}, "they mean the same, keep the right one"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
        ({"sliding_windw": 4096}, "unknown key 'sliding_windw'; correct it"),
        ({"num_hiden_layers": 4}, "(did you mean 'num_hidden_layers'?)"),
        ({"mup": 2, "logit_cap": 3}, "--ignore-config-key mup"),
    ],
)
def test_refuses_with_one_sentence(changes, sentence):
    with pytest.raises(InputError) as caught:
        Glm4MoeConfig.from_dict(changed(**changes), source="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert sentence in message
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) < 400


def test_unknown_keys_that_are_off_or_accepted_pass():
    config = Glm4MoeConfig.from_dict(AIR)
    assert Glm4MoeConfig.from_dict(AIR | {"sliding_window": None, "attn_output_gate": False}) == config
    assert Glm4MoeConfig.from_dict(AIR | {"mup": 2}, ignore=("mup",)) == config


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'{"model_type": "glm4_moe", "n_group": 1, "n_group": 2}', "the key 'n_group' appears twice"),
        (b'{"model_type": ', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a JSON list, expected an object"),
    ],
)
def test_refuses_malformed_files(tmp_path, data, sentence):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        Glm4MoeConfig.from_file(path)


def test_refuses_an_absent_file(tmp_path):
    with pytest.raises(InputError, match="can not be read"):
        Glm4MoeConfig.from_file(tmp_path / "config.json")


def test_a_config_is_checked_however_it_is_made():
    config = Glm4MoeConfig.from_dict(AIR)
    with pytest.raises(InputError, match="topk_group 4 is more than n_group 1"):
        dataclasses.replace(config, topk_group=4)


def test_with_layers():
    config = Glm4MoeConfig.from_dict(AIR | {"first_k_dense_replace": 3})
    assert config.with_layers(2).first_k_dense_replace == 2
    assert config.with_layers(5).moe_layers == range(3, 5)
    for count in (0, 47):
        with pytest.raises(UsageError, match=f"can not keep {count} of 46 layers"):
            config.with_layers(count)


def test_contract():
    config = Glm4MoeConfig.from_dict(AIR)
    made = contract(config, precision="fp8", logits="all", outputs=["attentions", "hidden_states"])
    assert made.compute_dtype == "bfloat16"
    assert made.outputs == ("hidden_states", "attentions")
    assert len(made.caches()) == 92
    with pytest.raises(UsageError, match="did you mean 'fp16'"):
        contract(config, precision="f16")
    with pytest.raises(UsageError, match="did you mean 'router_logits'"):
        contract(config, precision="fp8", outputs=["router_logit"])


@pytest.mark.parametrize("module", ["config", "layout", "recipe"])
def test_imports_no_torch(module):
    code = f"import sys, glm_export.exporter.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
