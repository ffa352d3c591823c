from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glm_export.exporter.layout import QUANTIZED, Parameter, parameters
from glm_export.exporter.precision import HIGH_PRECISION, storage_dtype
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.storage import Converted, blocks, convert, scale_name, stored_tensors
from glm_export.exporter.weight_file import ALIGNMENT, WeightFile
from glm_export.exporter.weights import read_bundle
from glm_export.plugins.library import CPU_VARIABLE
from glm_export.runtime.errors import InputError, UsageError
from glm_export.runtime.files import HashingWriter


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "fp8-head"])
def test_every_stored_tensor_is_the_source_rounded_once(bundle_of, tiny_checkpoint, precision):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    bundle = bundle_of(precision)
    read = read_bundle(bundle, checkpoint.config)
    kinds = set()
    for parameter in parameters(checkpoint.config).values():
        source = checkpoint.read(parameter)
        stored = read(parameter.name)
        assert stored.dtype == storage_dtype(precision, parameter.kind)
        kinds.add(parameter.kind)
        if parameter.kind in QUANTIZED.get(precision, ()):
            # numpy and ml_dtypes do by themselves what design section 3 says.
            weight = source.float().numpy()
            scale = (np.abs(weight).max(-1) / np.float32(448)).astype(np.float32)
            expected = (weight / scale[..., None]).astype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(read(scale_name(parameter.name)).numpy(), scale)
            np.testing.assert_array_equal(stored.view(torch.uint8).numpy(), expected.view(np.uint8))
        elif parameter.kind in HIGH_PRECISION or precision == "fp32":
            assert torch.equal(stored, source.float())
        else:
            assert torch.equal(stored, source.float().to(stored.dtype))
    assert len(kinds) == 8, "a kind of parameter is not covered by the tiny model"


def test_weight_files_are_safetensors_that_the_library_reads(bundle_of):
    for path in sorted((bundle_of("fp8").directory / "weights").iterdir()):
        with safe_open(path, framework="np") as file:
            assert file.keys()


def test_q_k_v_and_gate_up_lie_next_to_each_other(tiny_recipe):
    for precision in ("bf16", "fp8"):
        found = parameters(tiny_recipe.model)
        layer = [p for p in found.values() if p.group == "layer-001"]
        file = WeightFile.plan(
            "weights/layer-001.safetensors", (t for p in layer for t in stored_tensors(p, precision))
        )
        prefix = "model.layers.1."
        for names in (
            [f"{prefix}self_attn.{x}_proj.weight" for x in "qkv"],
            [f"{prefix}self_attn.{x}_proj.bias" for x in "qkv"],
            [f"{prefix}mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up")],
        ):
            places = [file.locations[name] for name in names]
            ends = [p.offset + p.length for p in places]
            assert [p.offset for p in places[1:]] == ends[:-1], names


def test_every_tensor_is_aligned_whatever_the_shapes(tmp_path):
    from glm_export.exporter.storage import WeightTensor

    tensors = [
        WeightTensor(name="a", shape=(3, 5), dtype=torch.float8_e4m3fn, small=False),
        WeightTensor(name="a_scale", shape=(3,), dtype=torch.float32, small=True),
        WeightTensor(name="b", shape=(7,), dtype=torch.bfloat16, small=False),
    ]
    file = WeightFile.plan("weights/odd.safetensors", tensors)
    assert [tensor.name for tensor in file.tensors] == ["a", "b", "a_scale"]
    assert all(location.offset % ALIGNMENT == 0 for location in file.locations.values())
    pieces = {
        "a": torch.arange(15.0).view(3, 5).to(torch.float8_e4m3fn),
        "a_scale": torch.tensor([1.0, 2.0, 3.0]),
        "b": torch.arange(7.0).to(torch.bfloat16),
    }
    with HashingWriter(tmp_path / "odd.safetensors") as writer:
        file.write(
            writer, [("a", pieces["a"][:2]), ("a_scale", pieces["a_scale"]), ("a", pieces["a"][2:]), ("b", pieces["b"])]
        )
    back = load_file(tmp_path / "odd.safetensors")
    for name, tensor in pieces.items():
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))


def _checkpoint_with(tiny_checkpoint: Path, folder: Path, name: str, change) -> Checkpoint:
    """A one-file copy of the tiny checkpoint with one tensor changed."""
    tensors = {}
    for shard in sorted(tiny_checkpoint.glob("*.safetensors")):
        tensors |= load_file(shard)
    tensors[name] = change(tensors[name].clone())
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    return Checkpoint.open(folder)


def _converted(checkpoint: Checkpoint, parameter: Parameter, precision: str) -> list[Converted]:
    return [convert(checkpoint, block, precision) for block in blocks(checkpoint, parameter)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_place(tiny_checkpoint, tmp_path, precision, bad):
    def poison(tensor):
        tensor[3, 7] = bad
        return tensor

    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    checkpoint = _checkpoint_with(tiny_checkpoint, tmp_path / "ck", name, poison)
    parameter = parameters(checkpoint.config)["model.layers.2.mlp.experts.gate_up_proj"]
    row = checkpoint.config.moe_intermediate_size + 3  # up rows come after the gate rows
    with pytest.raises(
        InputError, match=rf"model\.layers\.2\.mlp\.experts\.gate_up_proj\[5, {row}, 7\] is -?(nan|inf)"
    ):
        _converted(checkpoint, parameter, precision)


def test_fp16_refuses_what_it_can_not_hold_and_the_others_take_it(tiny_checkpoint, tmp_path):
    def enlarge(tensor):
        tensor[1, 2] = 1e5
        return tensor

    name = "model.layers.0.self_attn.q_proj.weight"
    checkpoint = _checkpoint_with(tiny_checkpoint, tmp_path / "ck", name, enlarge)
    parameter = parameters(checkpoint.config)[name]
    with pytest.raises(InputError, match=r"q_proj.weight\[1, 2\] is .*too large for torch.float16"):
        _converted(checkpoint, parameter, "fp16")
    for precision in ("fp32", "bf16", "fp8"):
        assert _converted(checkpoint, parameter, precision)


def test_blocks_do_not_change_what_is_stored(tiny_checkpoint, monkeypatch):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    parameter = parameters(checkpoint.config)["model.layers.0.mlp.down_proj.weight"]
    (whole,) = _converted(checkpoint, parameter, "fp8")
    monkeypatch.setattr("glm_export.exporter.storage.BLOCK_ELEMENTS", 500)
    pieces = _converted(checkpoint, parameter, "fp8")
    assert len(pieces) > 10
    for (name, want), *parts in zip(whole.stored, *(piece.stored for piece in pieces), strict=True):
        assert {part_name for part_name, _ in parts} == {name}
        assert torch.equal(torch.cat([part for _, part in parts]), want)


@pytest.mark.parametrize("form", ["scalar", "avx2", "portable"])
def test_every_form_of_the_quantizer_stores_the_same(tiny_checkpoint, monkeypatch, form):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    parameter = parameters(checkpoint.config)["model.layers.2.mlp.experts.gate_up_proj"]
    want = _converted(checkpoint, parameter, "fp8")
    monkeypatch.setenv(CPU_VARIABLE, form)
    for got, expected in zip(_converted(checkpoint, parameter, "fp8"), want, strict=True):
        for (name, a), (_, b) in zip(got.stored, expected.stored, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    monkeypatch.setenv(CPU_VARIABLE, "sse9")
    with pytest.raises(UsageError, match=r"GLM_EXPORT_CPU is 'sse9'.*or unset it"):
        _converted(checkpoint, parameter, "fp8")


def test_a_scale_is_positive_even_for_an_all_zero_row(tiny_checkpoint, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"

    def clear(tensor):
        tensor[4] = 0
        return tensor

    checkpoint = _checkpoint_with(tiny_checkpoint, tmp_path / "ck", name, clear)
    parameter = parameters(checkpoint.config)[name]
    (converted,) = _converted(checkpoint, parameter, "fp8")
    stored = dict(converted.stored)
    assert stored[scale_name(name)][4] == 1
    assert not stored[name].view(parameter.shape)[4].float().any()
    assert (stored[scale_name(name)] > 0).all()


def test_kinds_of_parameters_are_classified_for_every_precision(tiny_recipe):
    for parameter in parameters(dataclasses.replace(tiny_recipe.model, tie_word_embeddings=True)).values():
        assert storage_dtype("fp8", parameter.kind) in (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
