import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from glm_export.exporter.layout import expert_parts, mtp_parameters, parameters
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.source.shards import INDEX, SINGLE
from glm_export.exporter.source.source_file import read_exactly
from glm_export.runtime.errors import InputError, IntegrityError

TINY = load_recipe("tiny").model
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**TINY.to_hf_dict())).float()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.1, 0.1)
    return model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A small sharded checkpoint with an MTP layer; copy before changing it."""
    directory = tmp_path_factory.mktemp("pristine") / "checkpoint"
    write_random_checkpoint(TINY, directory, shard_bytes=200_000, tokenizer=False)
    return directory


@pytest.fixture
def sharded(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "sharded")


@pytest.fixture
def single(pristine, tmp_path):
    """The same checkpoint in one file, and that file's tensors to change."""
    directory = tmp_path / "single"
    directory.mkdir()
    shutil.copy(pristine / "config.json", directory)
    tensors = {name: tensor for shard in pristine.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    save_file(tensors, directory / SINGLE)
    return directory, tensors


def refused(directory):
    with pytest.raises(InputError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def assert_reads(checkpoint, state, dtype):
    for parameter in parameters(checkpoint.config).values():
        tensor = checkpoint.read(parameter)
        assert tensor.dtype == checkpoint.source_dtype(parameter)
        assert tensor.dtype == (torch.float32 if parameter.kind == "router_bias" else dtype)
        assert torch.equal(tensor, state[parameter.name].to(tensor.dtype)), parameter.name
        rows = tensor.view(-1, parameter.shape[-1]) if tensor.dim() > 1 else tensor
        pieces = checkpoint.pieces(parameter)
        assert sum(piece.rows for piece in pieces) == len(rows)
        position = 0
        for piece in pieces:
            assert (piece.columns, piece.row_scaled) == (None if tensor.dim() == 1 else tensor.shape[-1], False)
            last = piece.rows - piece.rows // 3  # some rows in the middle
            expected = rows[position + 1 : position + last]
            assert torch.equal(checkpoint.read_numbers(piece, 1, last), expected)
            position += piece.rows


@pytest.mark.parametrize(("dtype", "shard_size"), [("float32", "10GB"), ("bfloat16", "100KB")])
def test_reads_what_transformers_saves(reference, tmp_path, dtype, shard_size):
    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**TINY.to_hf_dict() | {"dtype": dtype}))
    model.load_state_dict(reference.state_dict())
    model = model.to(getattr(torch, dtype))
    for name, buffer in model.named_buffers():  # .to() converts it too; from_pretrained keeps it in float32
        if name.endswith("e_score_correction_bias"):
            buffer.data = reference.get_buffer(name).clone()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (dtype == "bfloat16")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.num_hidden_layers == TINY.num_hidden_layers
    assert checkpoint.mtp_tensors == {}
    assert_reads(checkpoint, reference.state_dict(), getattr(torch, dtype))


def test_reads_packed_experts_from_a_single_file(reference, tmp_path):
    save_file(reference.state_dict(), tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    assert_reads(Checkpoint.open(tmp_path), reference.state_dict(), torch.float32)


def test_sets_the_mtp_layer_aside(pristine):
    checkpoint = Checkpoint.open(pristine)
    assert {name.split(".")[2] for name in checkpoint.mtp_tensors} == {"4"}
    assert "model.layers.4.eh_proj.weight" in checkpoint.mtp_tensors
    assert {parameter.name for parameter in checkpoint.mtp} == set(mtp_parameters(TINY))
    for parameter in checkpoint.mtp:
        assert checkpoint.read(parameter).shape == parameter.shape
    (remark,) = checkpoint.remarks("bf16")
    count = len(checkpoint.mtp_tensors)
    assert remark == f"Layer 4 is for multi-token prediction: {count} tensors set aside."
    assert checkpoint.with_layers(4).mtp == checkpoint.mtp
    assert checkpoint.with_layers(3).mtp == ()


# What releases differ in: changes to the tensors of a single file, and which parameters are then there to be read.
MTP = "model.layers.4."
OWN = {f"{MTP}embed_tokens.weight", f"{MTP}shared_head.head.weight"}
MTP_VARIANTS = {
    "with its own embedding and head": (
        lambda t: t.update({name: torch.ones(512, 64).bfloat16() for name in OWN}),
        lambda names: names | OWN,
        "prediction, with its own embed_tokens and shared_head.head: ",
    ),
    "with only the scale of its own head": (
        lambda t: t.update({f"{MTP}shared_head.head.weight_scale": torch.ones(512, 1)}),
        lambda names: names,
        "prediction, with its own shared_head.head: ",
    ),
    "without some experts": (
        lambda t: t.pop(f"{MTP}mlp.experts.3.up_proj.weight"),
        lambda names: names - {f"{MTP}mlp.experts.gate_up_proj"},
        "prediction: ",
    ),
    "with FP8 that nothing explains": (
        lambda t: t.update({f"{MTP}eh_proj.weight": torch.ones(64, 128).to(torch.float8_e4m3fn)}),
        lambda names: names - {f"{MTP}eh_proj.weight"},
        "prediction: ",
    ),
}


@pytest.mark.parametrize("variant", MTP_VARIANTS)
def test_recognises_mtp_layers(single, variant):
    directory, tensors = single
    change, readable, remark = MTP_VARIANTS[variant]
    change(tensors)
    save_file(tensors, directory / SINGLE)
    checkpoint = Checkpoint.open(directory)
    assert {parameter.name for parameter in checkpoint.mtp} == readable(set(mtp_parameters(TINY)))
    assert set(checkpoint.mtp_tensors) == {name for name in tensors if name.startswith(MTP)}
    assert remark in checkpoint.remarks("bf16")[0]


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        (f"{MTP}eh_proj.weight", torch.zeros(64, 64), "eh_proj.weight has shape [64, 64], expected [64, 128]"),
        (f"{MTP}embed_tokens.weight", torch.zeros(4, 64), "embed_tokens.weight has shape [4, 64], expected [512, 64]"),
        (f"{MTP}surprise.weight", torch.zeros(1), f"{MTP}surprise.weight is unexpected"),
    ],
)
def test_refuses_mtp_tensors_that_are_none(single, name, tensor, sentence):
    directory, tensors = single
    save_file(tensors | {name: tensor}, directory / SINGLE)
    assert sentence in refused(directory)


def test_mtp_layer_may_lie_outside_the_index(sharded):
    index = json.loads((sharded / INDEX).read_text())
    mtp = {name: file for name, file in index["weight_map"].items() if name.startswith("model.layers.4.")}
    tensors = {}
    for file in set(index["weight_map"].values()):
        shard = load_file(sharded / file)
        tensors |= {name: shard.pop(name) for name in list(shard) if name in mtp}
        (sharded / file).unlink()
        if shard:
            save_file(shard, sharded / file)
    save_file(tensors, sharded / "mtp.safetensors")
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in mtp}
    (sharded / INDEX).write_text(json.dumps(index))
    assert set(Checkpoint.open(sharded).mtp_tensors) == set(mtp)


def test_what_was_read_can_be_changed_without_a_trace(single):
    directory, tensors = single
    before = (directory / SINGLE).read_bytes()
    checkpoint = Checkpoint.open(directory)
    parameter = parameters(TINY)[EMBED]
    checkpoint.read(parameter).zero_()
    assert (directory / SINGLE).read_bytes() == before
    assert torch.equal(checkpoint.read(parameter), tensors[EMBED])


def test_reads_from_several_threads_at_once(pristine):
    checkpoint = Checkpoint.open(pristine)
    found = list(parameters(TINY).values())
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(checkpoint.read, found))
    assert all(
        torch.equal(tensor, checkpoint.read(parameter)) for tensor, parameter in zip(together, found, strict=True)
    )


def test_reads_misaligned_tensors(single):
    directory, tensors = single
    data = (directory / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" "  # legal padding that puts every tensor on an odd offset
    (directory / SINGLE).write_bytes((length + 1).to_bytes(8, "little") + header + data[8 + length :])
    checkpoint = Checkpoint.open(directory)
    parameter = parameters(TINY)[EMBED]
    assert torch.equal(checkpoint.read(parameter), tensors[EMBED])
    gate_up = parameters(TINY)["model.layers.1.mlp.experts.gate_up_proj"]
    stored = torch.cat([tensors[name] for name in expert_parts(gate_up, 2)])
    assert torch.equal(checkpoint.read(gate_up)[2], stored)


def test_source_may_be_symbolic_links(pristine, tmp_path):
    for file in pristine.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert Checkpoint.open(tmp_path).identity() == Checkpoint.open(pristine).identity()


def touch(path):
    times = os.stat(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def grow(path):
    with path.open("ab") as file:
        file.write(b"x")


def replace(path):
    """By another file of the same content and time."""
    status = path.stat()
    shutil.copy2(path, path.with_suffix(".new"))
    os.utime(path.with_suffix(".new"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_suffix(".new").replace(path)


CHANGES = {
    "written to": (touch, "has been written to while it was being read"),
    "longer": (grow, "bytes long and now is"),
    "cut off": (lambda path: os.truncate(path, 1000), "bytes long and now is 1000"),
    "replaced": (replace, "has been replaced by another file"),
    "gone": (lambda path: path.unlink(), "has disappeared"),
}


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00001-of-00005.safetensors"])
@pytest.mark.parametrize("how", CHANGES)
def test_notices_every_file_that_changes_after_opening(sharded, how, file):
    checkpoint = Checkpoint.open(sharded)
    checkpoint.check_unchanged()
    change, sentence = CHANGES[how]
    change(sharded / file)
    with pytest.raises(IntegrityError) as caught:
        checkpoint.check_unchanged()
    assert sentence in str(caught.value)
    assert file in str(caught.value)


@pytest.mark.parametrize("how", [how for how in CHANGES if how != "gone"])
def test_reads_nothing_of_a_shard_that_changed(sharded, how):
    checkpoint = Checkpoint.open(sharded)
    change, sentence = CHANGES[how]
    change(sharded / "model-00001-of-00005.safetensors")
    with pytest.raises(IntegrityError, match=sentence):
        checkpoint.read(parameters(TINY)[EMBED])


def test_a_file_cut_off_under_a_reader_is_an_error_with_a_sentence(sharded):
    with (sharded / INDEX).open("rb") as file, pytest.raises(IntegrityError, match="has become shorter"):
        read_exactly(sharded / INDEX, file.fileno(), (sharded / INDEX).stat().st_size - 2, 4)


def test_a_read_error_is_an_error_with_a_sentence(sharded):
    with (sharded / INDEX).open("ab") as file, pytest.raises(InputError, match=r"Bad file descriptor.*check the disk"):
        read_exactly(sharded / INDEX, file.fileno(), 0, 4)


def test_identity_tells_checkpoints_apart_and_names_no_paths(pristine, single):
    identity = Checkpoint.open(pristine).identity()
    assert str(pristine) not in json.dumps(identity)
    assert [shard["file"] for shard in identity["shards"]] == sorted(
        path.name for path in pristine.glob("*.safetensors")
    )
    assert identity != Checkpoint.open(single[0]).identity()


# Changes to the tensors of a single file, and what the one message says.
TENSOR_CASES = {
    "missing": (lambda t: t.pop("model.norm.weight"), "1 tensor not as config.json asks: model.norm.weight is missing"),
    "expert missing": (
        lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"),
        "model.layers.2.mlp.experts.5.up_proj.weight is missing",
    ),
    "unexpected": (lambda t: t.update(extra=torch.zeros(1)), "extra is unexpected"),
    "unexpected expert": (
        lambda t: t.update({"model.layers.2.mlp.experts.8.up_proj.weight": torch.zeros(1)}),
        "model.layers.2.mlp.experts.8.up_proj.weight is unexpected",
    ),
    "both expert forms": (
        lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 64, 32)}),
        "model.layers.1.mlp.experts.0.down_proj.weight is unexpected",
    ),
    "layer after the MTP layer": (
        lambda t: t.update({"model.layers.5.enorm.weight": torch.zeros(64)}),
        "model.layers.5.enorm.weight is unexpected",
    ),
    "shape": (
        lambda t: t.update({"lm_head.weight": torch.zeros(64, 512)}),
        "lm_head.weight has shape [64, 512], expected [512, 64]",
    ),
    "integer dtype": (
        lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int16)}),
        "model.norm.weight is I16, expected one of BF16, F16, F32",
    ),
    "fp8 dtype": (
        lambda t: t.update({"lm_head.weight": torch.zeros(512, 64, dtype=torch.float8_e4m3fn)}),
        "lm_head.weight is F8_E4M3, but config.json does not say how it is quantized",
    ),
    "mixed experts": (
        lambda t: t.update({"model.layers.3.mlp.experts.7.down_proj.weight": torch.zeros(64, 32)}),
        "model.layers.3.mlp.experts.7.down_proj.weight is F32, but other experts of its layer are BF16",
    ),
    "several at once": (
        lambda t: (t.pop("model.norm.weight"), t.update(extra=torch.zeros(1))),
        "2 tensors not as config.json asks: model.norm.weight is missing; extra is unexpected",
    ),
    "many at once": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.1.mlp.experts.")],
        "and 4 more.",
    ),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_reports_tensors_by_name(single, case):
    directory, tensors = single
    change, sentence = TENSOR_CASES[case]
    change(tensors)
    save_file(tensors, directory / SINGLE)
    assert sentence in refused(directory)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.pth", "model.pt"])
def test_never_opens_pickles(single, file):
    directory, _ = single
    (directory / SINGLE).unlink()
    (directory / file).write_bytes(b"\x80\x04.")
    assert f"has {file} but no safetensors; such files can run code" in refused(directory)


def test_refuses_other_folders(single, tmp_path):
    directory, _ = single
    assert "is no folder" in refused(tmp_path / "absent")
    (directory / SINGLE).unlink()
    assert "has no weights" in refused(directory)
    os.mkfifo(directory / SINGLE)
    assert "not a regular file" in refused(directory)
    (directory / SINGLE).unlink()
    (directory / SINGLE).symlink_to("nowhere")
    assert "can not be read (No such file or directory)" in refused(directory)
    (directory / "config.json").unlink()
    assert "config.json: can not be read (No such file or directory)" in refused(directory)
