"""The FP8 checkpoints we write: transformers with compressed-tensors loads them, and so do we, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from cli_tools import bundle, call, checkpoint, copied, refused
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from glm_export.exporter.gpus import GPUS, gpus_needed, tensor_parallel_size
from glm_export.exporter.hf_checkpoint import FORMATS
from glm_export.exporter.serving import ENGINES, launch_lines, splits
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.weights import reference_of_checkpoint

TOLERANCE = 2e-5
"""As of the float32 reference against transformers: sums in another order."""


def written(tmp_path: Path, source: Path, format: str = "compressed-tensors") -> Path:
    out = tmp_path / format
    called = call("checkpoint", source, "--format", format, "-o", out, "--quiet", "--json")
    assert called.code == 0, called
    assert json.loads(called.out)["format"] == format
    return out


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return found


@pytest.mark.filterwarnings("ignore")  # what other people's loaders warn about is not ours
def test_transformers_computes_our_logits(tmp_path: Path) -> None:
    out = written(tmp_path, checkpoint())
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", quantization_config=config
    ).eval()
    ids = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(ids).logits
        got = reference_of_checkpoint(Checkpoint.open(out))(ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_a_build_from_it_is_bit_for_bit_the_bundle(tmp_path: Path, kind: str, format: str) -> None:
    source = checkpoint() if kind == "checkpoint" else bundle("fp8")
    out = written(tmp_path, source, format)
    again = tmp_path / "bundle"
    assert call("build", out, "-o", again, "--recipe", "tiny", "--precision", "fp8", "--quiet").code == 0
    files = sorted(path.name for path in (bundle("fp8") / "weights").iterdir())
    assert files == sorted(path.name for path in (again / "weights").iterdir())
    for name in files:
        assert (again / "weights" / name).read_bytes() == (bundle("fp8") / "weights" / name).read_bytes(), name


def test_an_unquantized_bundle_is_quantized(tmp_path: Path) -> None:
    """A bf16 bundle holds what the checkpoint holds, so the same FP8 comes of both."""
    from_bundle, direct = (
        tensors_of(written(tmp_path / name, source))
        for name, source in (("bundle", bundle("bf16")), ("checkpoint", checkpoint()))
    )
    assert from_bundle.keys() < direct.keys()  # all but multi-token prediction, which bundles do not have
    for name, tensor in from_bundle.items():
        assert tensor.dtype == direct[name].dtype, name
        assert torch.equal(tensor.float(), direct[name].float()), name


@pytest.mark.parametrize(("format", "shape"), [("compressed-tensors", (32, 1)), ("modelopt", (32,))])
def test_names_shapes_and_exceptions_are_the_vendors(tmp_path: Path, format: str, shape: tuple[int, ...]) -> None:
    out = written(tmp_path, checkpoint(), format)
    found = tensors_of(out)
    config = Checkpoint.open(out).config
    expert = found["model.layers.2.mlp.experts.3.gate_proj.weight"]
    assert expert.dtype == torch.float8_e4m3fn
    assert found["model.layers.2.mlp.experts.3.gate_proj.weight_scale"].shape == (len(expert), *shape[1:])
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.2.mlp.gate.weight", "model.norm.weight"):
        assert found[name].dtype == torch.bfloat16, name
    assert found["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    (layer,) = config.mtp_layers
    assert found[f"model.layers.{layer}.eh_proj.weight"].dtype == torch.bfloat16
    assert found[f"model.layers.{layer}.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn

    quantization = json.loads((out / "config.json").read_text())["quantization_config"]
    quantized = {name.removesuffix(".weight") for name, t in found.items() if t.dtype == torch.float8_e4m3fn}
    assert not quantized & set(quantization["ignore"])
    assert {"lm_head", "model.layers.2.mlp.gate", f"model.layers.{layer}.eh_proj"} <= set(quantization["ignore"])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_half_an_mtp_layer_is_not_passed_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert call("make-checkpoint", "--recipe", "tiny", "-o", whole, "--quiet").code == 0
    (layer,) = Checkpoint.open(whole).config.mtp_layers
    tensors = tensors_of(whole)
    del tensors[f"model.layers.{layer}.enorm.weight"]
    save_file(tensors, whole / "model.safetensors", {"format": "pt"})
    out = written(tmp_path, whole)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(f"layers.{layer}." in name for name in tensors_of(out))


def test_bad_input(tmp_path: Path) -> None:
    assert "already exists" in refused(2, "checkpoint", checkpoint(), "-o", checkpoint())
    assert "was built without weights" in refused(3, "checkpoint", _graph(tmp_path), "-o", tmp_path / "a")
    message = refused(2, "checkpoint", bundle("fp8-head"), "-o", tmp_path / "c")
    assert "has its lm_head in bf16: start from the original checkpoint" in message
    damaged = copied(bundle("fp8"), tmp_path / "damaged")
    path = damaged / "weights" / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "head.safetensors" in refused(8, "checkpoint", damaged, "-o", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def _graph(tmp_path: Path) -> Path:
    out = tmp_path / "graph"
    assert call("build", "--no-weights", "--recipe", "tiny", "-o", out, "--quiet").code == 0
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_launch_lines_name_the_split(format: str) -> None:
    lines = list(launch_lines(Path("a folder"), format, 4))
    assert len(lines) == len(ENGINES[format])
    assert all("'a folder'" in line and " 4" in line for line in lines)


def test_splits_hold_the_weights_and_divide_the_heads() -> None:
    glm_4_7 = 354_900_000_000  # bytes of the vendor's FP8 checkpoint
    by_name = {name: size for size, names in splits(glm_4_7, kv_heads=8).items() for name in names}
    assert by_name == {"B200": 4, "H200": 4, "H100": 8, "RTX PRO 6000": 8}  # L40S: 9 GPUs, and 8 KV heads
    for gpu in GPUS:
        size = tensor_parallel_size(gpus_needed(glm_4_7, gpu), 8)
        assert (size is None) == (gpu.name not in by_name)
        assert size is None or size * gpu.bytes * 0.9 >= glm_4_7
