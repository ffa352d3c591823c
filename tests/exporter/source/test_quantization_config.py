"""Which linears a quantization_config means, compared with those who defined the dialects."""

import fnmatch
import math

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from hypothesis import given
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from glm_export.exporter.layout import parameters, parts
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source import quantized
from glm_export.exporter.source.quantization_config import parse_quantization
from glm_export.exporter.source.quantized import Names, Scheme
from glm_export.runtime.errors import InputError

MODULES = [
    name.removesuffix(".weight")
    for parameter in parameters(load_recipe("tiny").model).values()
    if parameter.kind in ("linear", "experts", "lm_head", "router")
    for name in parts(parameter)
]


def of_modules(quantization):
    return {module for module in MODULES if quantization.scheme(module) is not None}


@pytest.mark.parametrize(
    "ignore",
    [
        [],
        ["lm_head"],
        ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate"],
        ["model.layers.1"],  # a whole name, and no module has it
        ["re:.*gate$", "lm_head", "model.embed_tokens"],
        ["re:model\\.layers\\.[12]\\.mlp\\.experts\\.\\d+\\.(gate|up)_proj"],
        ["re:(?!model).*", "re:.*self_attn"],
        ["re:.*layers.3.*", "re:.*\\.k_proj$"],
        ["mlp.gate_proj", "gate"],  # no prefixes and no endings
    ],
)
def test_compressed_tensors_names(ignore):
    group = {
        "targets": ["re:.*layers.*", "lm_head"],
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"},
    }
    table = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
    QuantizationConfig.model_validate(table)
    expected = {
        module
        for module in MODULES
        if any(match_name(module, target) for target in group["targets"])
        and not any(match_name(module, entry) for entry in ignore)
    }
    quantization = parse_quantization({"quantization_config": table}, None, "config.json")
    assert of_modules(quantization) == expected
    assert 0 < len(expected) <= len(MODULES)


@pytest.mark.parametrize(
    "skipped",
    [
        [],
        ["lm_head"],
        ["mlp.gate", "lm_head"],
        ["model.layers.1"],  # and all below it, but not below model.layers.11
        ["model.layers.1."],
        ["self_attn.k_proj"],
        ["model.layers.*.mlp.gate"],
        ["model.layers.[01].self_attn", "down_proj"],
        ["gate"],
    ],
)
def test_fp8_names(skipped):
    table = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": skipped}
    quantization = parse_quantization({"quantization_config": table}, None, "config.json")
    expected = {module for module in MODULES if should_convert_module(module, skipped)}
    assert of_modules(quantization) == expected
    table["ignored_layers"] = table.pop("modules_to_not_convert")
    assert of_modules(parse_quantization({"quantization_config": table}, None, "config.json")) == expected


@pytest.mark.parametrize(
    "excluded",
    [[], ["lm_head"], ["model.layers.*.mlp.gate", "lm_head"], ["model.layers.0*"], ["*.k_pro?", "*[12].mlp*"]],
)
@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json", "both"])
def test_modelopt_names(excluded, where):
    table = {"quant_algo": "FP8", "exclude_modules": excluded}
    config = {"quantization_config": table | {"quant_method": "modelopt"}} if where != "hf_quant_config.json" else {}
    hf_quant = {"quantization": table} if where != "config.json" else None
    quantization = parse_quantization(config, hf_quant, "config.json")
    expected = {m for m in MODULES if not any(fnmatch.fnmatchcase(m, pattern) for pattern in excluded)}
    assert of_modules(quantization) == expected


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "FP8", "FP8_BLOCK"])
def test_a_group_may_be_a_scheme_by_name(name):
    table = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {name: ["Linear"]}}
    by_name = parse_quantization({"quantization_config": table}, None, "config.json")
    spelled = QuantizationConfig.model_validate(table).model_dump(mode="json")
    assert "weights" in spelled["config_groups"][name]
    written_out = parse_quantization({"quantization_config": spelled}, None, "config.json")
    assert by_name.scheme("lm_head") == written_out.scheme("lm_head")


def test_what_a_group_leaves_out_is_what_compressed_tensors_takes_it_for():
    group = {
        "targets": ["Linear"],
        "weights": {"type": "float", "strategy": "tensor", "group_size": -1},
        "input_activations": {"type": "float", "num_bits": 8, "dynamic": False},
    }
    table = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    scheme = parse_quantization({"quantization_config": table}, None, "config.json").scheme("lm_head")
    assert scheme == Scheme(rows=None, columns=None, activations="statically per tensor")
    weights = QuantizationConfig.model_validate(table).config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric, weights.dynamic) == (8, True, False)
    del group["weights"]["type"]
    with pytest.raises(InputError, match=r"weights\.type is 'int', but only 'float' is read"):
        parse_quantization({"quantization_config": table}, None, "config.json")


def test_the_first_group_that_matches_counts():
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    groups = {
        "group_0": {"targets": ["re:.*experts.*"], "weights": weights | {"strategy": "channel"}},
        "group_1": {"targets": ["Linear"], "weights": weights | {"strategy": "block", "block_structure": [128, 128]}},
    }
    table = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    quantization = parse_quantization({"quantization_config": table}, None, "config.json")
    assert str(quantization.scheme("model.layers.1.mlp.experts.0.up_proj")) == "per channel"
    assert str(quantization.scheme("model.layers.1.self_attn.q_proj")) == "in blocks of 128x128"


@pytest.mark.parametrize("algorithm", ["FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo"])
def test_other_algorithms_of_modelopt(algorithm):
    quantization = parse_quantization({}, {"quantization": {"quant_algo": algorithm}}, "config.json")
    scheme = quantization.scheme("lm_head")
    assert scheme.row_scaled((256, 256)) == (algorithm == "FP8_PER_CHANNEL_PER_TOKEN")
    # Weight-only blocks come with an axis of length 1 after each of the two.
    assert scheme.fits((2, 1, 2, 1) if algorithm == "fp8_pb_wo" else (256,), (256, 256))
    assert not scheme.fits((2, 3), (256, 256))


@pytest.mark.parametrize(
    ("stored", "shape", "good"),
    [
        ((3, 2), (300, 200), True),
        ((2, 3), (300, 200), False),
        ((3, 1, 2, 1), (300, 200), True),
        ((2,), (200, 100), True),
        ((), (100, 100), True),
        ((1, 1), (128, 128), True),
        ((1, 1), (129, 128), False),
    ],
)
def test_shapes_of_block_scales(stored, shape, good):
    assert Scheme(rows=128, columns=128).fits(stored, shape) is good


@given(data=st.data())
def test_every_element_gets_the_scale_of_its_block(data):
    rows, columns, block_rows, block_columns = (data.draw(st.integers(1, 20)) for _ in range(4))
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    scheme = Scheme(rows=block_rows, columns=block_columns)
    grid = scheme.grid((rows, columns))
    assert grid == (math.ceil(rows / block_rows), math.ceil(columns / block_columns))
    scale = torch.arange(1.0, grid[0] * grid[1] + 1).view(grid)
    expected = np.repeat(np.repeat(scale.numpy(), block_rows, 0), block_columns, 1)[first:last, :columns]
    found = scheme.of_rows(scale, first, last, (rows, columns)).expand(last - first, columns)
    assert np.array_equal(found.numpy(), expected)
    assert scheme.row_scaled((rows, columns)) == (block_columns >= columns)


def test_patterns_that_take_long_are_given_up(monkeypatch):
    monkeypatch.setattr(quantized, "_PATTERN_SECONDS", 0.01)
    names = Names((), ["(a|a)*$"])  # which quantization_config would not let through

    def match_longer_and_longer():
        for length in range(60):  # twice the time for each
            assert "a" * length + "b" not in names

    with pytest.raises(InputError, match="take too long"):
        match_longer_and_longer()
