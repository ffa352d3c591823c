import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from glm_export.exporter.checkpoint import INDEX, SINGLE, Checkpoint
from glm_export.exporter.layout import expert_parts, parameters
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe
from glm_export.runtime.errors import InputError

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
        if parameter.kind == "experts":
            for e in range(parameter.shape[0]):
                assert torch.equal(checkpoint.read_expert(parameter, e), tensor[e])


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


def test_reading_is_a_view_and_writes_stay_private(single):
    directory, tensors = single
    before = (directory / SINGLE).read_bytes()
    checkpoint = Checkpoint.open(directory)
    parameter = parameters(TINY)[EMBED]
    tensor = checkpoint.read(parameter)
    tensor.zero_()
    assert (directory / SINGLE).read_bytes() == before
    assert torch.equal(checkpoint.read(parameter), tensors[EMBED])


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
    assert torch.equal(checkpoint.read_expert(gate_up, 2), stored)


def test_source_may_be_symbolic_links(pristine, tmp_path):
    for file in pristine.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert Checkpoint.open(tmp_path).identity() == Checkpoint.open(pristine).identity()


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
        "lm_head.weight is F8_E4M3, expected one of",
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


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def edit(change):
    """A header change given as a change of its table."""

    def apply(header):
        table = json.loads(header)
        change(table)
        return json.dumps(table).encode()

    return apply


HEADER_CASES = {
    "no object": (lambda header: b" " + header, "does not start with '{'"),
    "not JSON": (lambda header: header.rstrip()[:-1], "not valid JSON"),
    "duplicate name": (lambda header: b'{"a": 1, "a": 2, ' + header[1:], "the key 'a' appears twice"),
    "empty name": (edit(lambda t: t.update({"": t.pop(EMBED)})), "the tensor name '' is empty or not a plain name"),
    "NUL in name": (edit(lambda t: t.update({"a\0b": t.pop(EMBED)})), "not a plain name"),
    "path as name": (edit(lambda t: t.update({"../x": t.pop(EMBED)})), "not a plain name"),
    "unknown field": (edit(lambda t: t[EMBED].update(extra=1)), f"{EMBED} has fields"),
    "entry is no table": (edit(lambda t: t.update({EMBED: 3})), f"{EMBED} has fields []"),
    "unknown dtype": (edit(lambda t: t[EMBED].update(dtype="Q4")), "unknown dtype 'Q4'"),
    "negative shape": (edit(lambda t: t[EMBED].update(shape=[-512, -64])), "expected positive integers"),
    "zero shape": (edit(lambda t: t[EMBED].update(shape=[0, 64])), "expected positive integers"),
    "float offset": (edit(lambda t: t[EMBED].update(data_offsets=[0, 65536.0])), "expected two"),
    "bytes != shape": (
        edit(lambda t: t[EMBED].update(shape=[512, 63])),
        "has 65536 bytes, its dtype and shape need 64512",
    ),
    "overlap": (
        edit(lambda t: t["model.norm.weight"].update(data_offsets=[0, 128])),
        "overlaps the tensor before it",
    ),
    "hole": (edit(lambda t: t.pop(EMBED)), "leaves a hole before it"),
    "metadata": (edit(lambda t: t.update(__metadata__={"a": 1})), "__metadata__ is not a table of strings"),
}


@pytest.mark.parametrize("case", HEADER_CASES)
def test_refuses_malformed_headers(single, case):
    directory, _ = single
    change, sentence = HEADER_CASES[case]
    rewrite_header(directory / SINGLE, change)
    message = refused(directory)
    assert sentence in message
    assert SINGLE in message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data[:-1], "truncated: is {minus_one} bytes long, expected {size}"),
        (lambda data: data[:100], "truncated: is 100 bytes long, its header alone needs"),
        (lambda data: data[:3], "is 3 bytes long, expected a safetensors file"),
        (lambda data: b"", "is 0 bytes long"),
        (lambda data: data + b"x", "bytes long, expected {size}"),
        (lambda data: (2**63).to_bytes(8, "little") + data[8:], "announces a 9223372036854775808-byte header"),
    ],
)
def test_refuses_shards_of_the_wrong_size(single, change, sentence):
    directory, _ = single
    data = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(change(data))
    assert sentence.format(size=len(data), minus_one=len(data) - 1) in refused(directory)


def change_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update({EMBED: "../model.safetensors"}), "expected a plain file name"),
        (lambda m: m.update({EMBED: "/etc/passwd"}), "expected a plain file name"),
        (lambda m: m.update({EMBED: "weights.bin"}), "expected a plain file name"),
        (lambda m: m.update({EMBED: 3}), "expected a plain file name"),
        (lambda m: m.update({EMBED: "model-00099-of-00099.safetensors"}), "1 of 6 shards missing"),
        (lambda m: m.pop(EMBED), f"{EMBED} is in model-00001-of-00005.safetensors but not in the index"),
        (lambda m: m.update({EMBED: m["lm_head.weight"]}), f"{EMBED} is in model-00001-of-00005.safetensors, not in"),
        (lambda m: m.update(ghost=m[EMBED]), "ghost is in the index but not in model-00001-of-00005.safetensors"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_refuses_wrong_indices(sharded, change, sentence):
    change_index(sharded, change)
    assert sentence in refused(sharded)


def test_refuses_a_missing_shard(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink()
    assert "1 of 5 shards missing (model-00002-of-00005.safetensors); finish the download" in refused(sharded)


def test_refuses_a_tensor_in_two_shards(sharded):
    shutil.copy(sharded / "model-00002-of-00005.safetensors", sharded / "z.safetensors")
    assert "is stored in both model-00002-of-00005.safetensors and z.safetensors" in refused(sharded)


def test_refuses_strangers_outside_the_index(sharded):
    save_file({"extra": torch.zeros(1)}, sharded / "extra.safetensors")
    assert "extra in extra.safetensors, which the index does not list" in refused(sharded)


def test_refuses_shards_without_their_index(sharded):
    (sharded / INDEX).unlink()
    assert f"but neither {INDEX} nor {SINGLE}" in refused(sharded)


def test_refuses_duplicate_keys_in_the_index(sharded):
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace(f'"{EMBED}"', f'"{EMBED}": "a.safetensors", "{EMBED}"'))
    assert f"the key '{EMBED}' appears twice" in refused(sharded)


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
    assert "has no readable config.json" in refused(directory)
