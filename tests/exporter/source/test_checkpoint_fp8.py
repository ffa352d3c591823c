"""FP8 checkpoints as vendors write them: the numbers that other readers get, and the same bytes in our own fp8."""

import json
import shutil

import fp8_checkpoints as fp8
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glm_export.exporter import storage
from glm_export.exporter.build import build
from glm_export.exporter.layout import parameters
from glm_export.exporter.progress import Reporter
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.source.quantized import RoundingError
from glm_export.exporter.weights import reference_of_checkpoint
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import InputError

TINY = load_recipe("tiny").model
Q = "model.layers.0.self_attn.q_proj"
FP8_LINEARS = 4 * 4 + 3 + 3 * (2 + 3)  # attention, one dense MLP, and in each MoE layer the experts and the shared one

LAYOUTS = {
    "per channel": lambda source, out: fp8.compressed_tensors(source, out),
    "per channel, bf16 scales, key is the scheme": lambda source, out: fp8.compressed_tensors(
        source, out, scale_dtype=torch.bfloat16, key="FP8_DYNAMIC"
    ),
    "per tensor": lambda source, out: fp8.compressed_tensors(source, out, strategy="tensor"),
    "compressed-tensors blocks": lambda source, out: fp8.compressed_tensors(
        source, out, strategy="block", block=(16, 32)
    ),
    "fp8 blocks": lambda source, out: fp8.fp8_block(source, out, (32, 16)),
    "fp8 blocks that do not divide": lambda source, out: fp8.fp8_block(source, out, (48, 24)),
    "modelopt": lambda source, out: fp8.modelopt(source, out),
    "modelopt, said twice": lambda source, out: fp8.modelopt(source, out, in_config=True),
}
ROW_SCALED = [name for name in LAYOUTS if "blocks" not in name]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain") / "checkpoint"
    write_random_checkpoint(TINY, directory, tokenizer=False)
    return directory


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory):
    """The checkpoint in a layout, made once; copy before changing it."""
    root = tmp_path_factory.mktemp("fp8")
    found = {}

    def get(name):
        if name not in found:
            found[name] = LAYOUTS[name](plain, root / str(len(found)))
        return found[name]

    return get


def expected_numbers(directory, tensors, name):
    """What a linear stands for, by compressed-tensors where it reads the layout, else by numpy."""
    module = name.removesuffix(".weight")
    config = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    if config.get("quant_method") == "compressed-tensors":
        (group,) = config["config_groups"].values()
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        scheme = QuantizationScheme.model_validate(group)
        state = {"weight": tensors[name], "weight_scale": tensors[f"{module}.weight_scale"].float()}
        return compressor.decompress(state, scheme)["weight"]
    if config.get("quant_method") == "fp8":
        block = tuple(config["weight_block_size"])
        return fp8.dequantize(tensors[name], tensors[f"{name}_scale_inv"], block)
    return fp8.dequantize(tensors[name], tensors[f"{module}.weight_scale"].reshape(1, 1), tensors[name].shape)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_another_reader(made, layout):
    checkpoint = Checkpoint.open(made(layout))
    tensors = load_file(made(layout) / "model.safetensors")
    quantized = 0
    for parameter in parameters(TINY).values():
        pieces = checkpoint.pieces(parameter)
        quantized += pieces[0].scheme is not None
        for piece in pieces:
            expected = tensors[piece.name]
            if piece.scheme:
                expected = expected_numbers(made(layout), tensors, piece.name)
            middle = piece.rows // 3
            numbers = [checkpoint.read_numbers(piece, *rows) for rows in ((0, middle), (middle, piece.rows))]
            assert torch.equal(torch.cat(numbers), expected), piece.name
    assert quantized == FP8_LINEARS


def test_blocks_are_read_as_compressed_tensors_reads_them(made):
    directory = made("fp8 blocks")
    tensors = load_file(directory / "model.safetensors")
    dequantizer = FP8BlockDequantizer.from_pretrained(directory, weight_block_size=(32, 16), dtype=torch.float32)
    expected = dequantizer.process(dict(tensors))
    checkpoint = Checkpoint.open(directory)
    for parameter in parameters(TINY).values():
        for piece in checkpoint.pieces(parameter):
            assert torch.equal(checkpoint.read_numbers(piece, 0, piece.rows), expected[piece.name])


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own keys
@pytest.mark.parametrize("layout", ["per channel", "per tensor"])
def test_logits_are_those_of_transformers(made, layout):
    """transformers 5.23 can not load the other layouts: it needs accelerate for fp8, and has no blocks for experts."""
    config = transformers.CompressedTensorsConfig(dequantize=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(made(layout), dtype=torch.float32, quantization_config=config)
    checkpoint = Checkpoint.open(made(layout))
    state = model.state_dict()
    for parameter in parameters(TINY).values():
        assert torch.equal(state[parameter.name], checkpoint.read(parameter).float()), parameter.name
    ids = torch.randint(0, TINY.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
        ours = reference_of_checkpoint(checkpoint)(ids, length=torch.tensor([24, 24])).logits
    # The same float32 weights: only the order of sums differs, as in the tests of the reference model.
    torch.testing.assert_close(ours, logits, rtol=2e-5, atol=2e-5)


def carried(checkpoint, tensors, parameter):
    """A parameter's E4M3 bytes and row scales, flat, put together from the tensors of the checkpoint."""
    names = [piece.name for piece in checkpoint.pieces(parameter)]
    scales = [tensors[f"{name}_scale"].float().flatten().expand(len(tensors[name])) for name in names]
    return torch.cat([tensors[name].view(torch.uint8).flatten() for name in names]), torch.cat(scales)


@pytest.mark.parametrize("layout", ROW_SCALED)
def test_row_scaled_weights_are_carried_over_bit_for_bit(made, layout, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK_ELEMENTS", 700)  # several blocks per tensor
    tensors = load_file(made(layout) / "model.safetensors")
    checkpoint = Checkpoint.open(made(layout))
    count = 0
    for parameter in parameters(TINY).values():
        if parameter.kind not in ("linear", "experts"):
            continue
        converted = [storage.convert(checkpoint, block, "fp8") for block in storage.blocks(checkpoint, parameter)]
        assert len(converted) > 1
        assert {each.rounding for each in converted} == {None}
        values, scale = (torch.cat([each.stored[i][1] for each in converted]) for i in (0, 1))
        expected, expected_scale = carried(checkpoint, tensors, parameter)
        assert torch.equal(values.view(torch.uint8), expected), parameter.name
        assert torch.equal(scale, expected_scale), parameter.name
        count += 1
    assert count == FP8_LINEARS


def test_a_bundle_of_an_fp8_checkpoint_has_its_bytes_and_says_so(made, tmp_path):
    checkpoint = Checkpoint.open(made("per channel"))
    build(checkpoint, load_recipe("tiny", {"precision": "fp8"}), tmp_path / "bundle", Reporter(quiet=True))
    bundle = Bundle.open(tmp_path / "bundle")
    assert f"{FP8_LINEARS} carried over bit for bit" in bundle.manifest.source["remarks"][1]
    tensors = load_file(made("per channel") / "model.safetensors")
    parameter = parameters(TINY)["model.layers.1.mlp.experts.gate_up_proj"]
    with safe_open(bundle.file("weights/layer-001.safetensors"), framework="pt") as file:
        values, scale = file.get_tensor(parameter.name), file.get_tensor(storage.scale_name(parameter.name))
    expected, expected_scale = carried(checkpoint, tensors, parameter)
    assert torch.equal(values.view(torch.uint8).flatten(), expected)
    assert torch.equal(scale.flatten(), expected_scale)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_other_precisions_dequantize_once(made, precision):
    checkpoint = Checkpoint.open(made("fp8 blocks"))
    tensors = load_file(made("fp8 blocks") / "model.safetensors")
    (block,) = storage.blocks(checkpoint, parameters(TINY)[f"{Q}.weight"])
    ((_, values),) = storage.convert(checkpoint, block, precision).stored
    exact = fp8.dequantize(tensors[f"{Q}.weight"], tensors[f"{Q}.weight_scale_inv"], (32, 16))
    assert torch.equal(values, exact.to(values.dtype).flatten())
    assert values.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def test_blocks_are_quantized_once_more_and_the_error_is_reported(made):
    checkpoint = Checkpoint.open(made("fp8 blocks"))
    tensors = load_file(made("fp8 blocks") / "model.safetensors")
    (block,) = storage.blocks(checkpoint, parameters(TINY)[f"{Q}.weight"])
    converted = storage.convert(checkpoint, block, "fp8")
    source = fp8.dequantize(tensors[f"{Q}.weight"], tensors[f"{Q}.weight_scale_inv"], (32, 16))
    scale = source.abs().amax(1) / 448
    (_, values), (_, scales) = converted.stored
    assert torch.equal(scales, scale)
    numbers = values.view(source.shape).double() * scale[:, None]
    error = converted.rounding
    # The product of an E4M3 value and a scale is rounded to float32 where this sums in float64: 2^-24 of 2^-5.
    assert error.worst == pytest.approx(float((numbers - source).norm() / source.norm()), rel=1e-5)
    # Rounding to 3 bits after the leading one is off by at most 2^-4, and some values lie between.
    assert 0 < error.overall < 2**-4
    both = error + RoundingError(worst=0.5, squared_error=0.0, squared_norm=error.squared_norm)
    assert both.worst == 0.5
    assert both.overall == pytest.approx(error.overall / 2**0.5)


def test_blocks_as_wide_as_a_row_are_carried_over_too(plain, tmp_path):
    checkpoint = Checkpoint.open(fp8.fp8_block(plain, tmp_path / "wide"))  # 128 x 128, and no row is longer than 128
    piece = checkpoint.pieces(parameters(TINY)[f"{Q}.weight"])[0]
    assert piece.row_scaled
    values, scale = checkpoint.read_fp8(piece, 5, 9)
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    assert torch.equal(values.view(torch.uint8), tensors[f"{Q}.weight"][5:9].view(torch.uint8))
    assert torch.equal(scale, tensors[f"{Q}.weight_scale_inv"].flatten().expand(4))


@pytest.mark.parametrize(
    ("layout", "precision", "sentences"),
    [
        (
            "per channel",
            "fp8",
            [f"FP8 weights (compressed-tensors): {FP8_LINEARS} carried over bit for bit (per channel)."],
        ),
        ("per channel", "bf16", [f"FP8 weights (compressed-tensors): {FP8_LINEARS} dequantized once."]),
        (
            "fp8 blocks",
            "fp8",
            [
                f"FP8 weights (fp8): {FP8_LINEARS} quantized once more, per channel (in blocks of 32x16).",
                "made for activations quantized dynamically per group; here they are dynamically per token.",
            ],
        ),
        (
            "modelopt",
            "fp8",
            [
                f"{FP8_LINEARS} carried over bit for bit (per tensor).",
                "made for activations quantized statically per tensor",
                "scales for activations or the KV cache are not used.",
            ],
        ),
    ],
)
def test_what_becomes_of_the_weights_is_said(made, layout, precision, sentences):
    mtp, *found = Checkpoint.open(made(layout)).remarks(precision)
    assert "Layer 4 is for multi-token prediction" in mtp
    assert len(found) == len(sentences)
    for sentence, expected in zip(found, sentences, strict=True):
        assert expected in sentence


def rewritten(source, out, change):
    """A copy of a checkpoint in one shard, its tensors and config changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    change(tensors, config)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_linear_that_the_vendor_left_alone_is_quantized_here(made, plain, tmp_path):
    original = load_file(plain / "model.safetensors")[f"{Q}.weight"]

    def change(tensors, config):
        tensors[f"{Q}.weight"] = original
        del tensors[f"{Q}.weight_scale"]
        config["quantization_config"]["ignore"].append("re:.*layers\\.0\\.self_attn\\.q_proj$")

    checkpoint = Checkpoint.open(rewritten(made("per channel"), tmp_path / "checkpoint", change))
    assert checkpoint.pieces(parameters(TINY)[f"{Q}.weight"])[0].dtype == torch.bfloat16
    assert "1 not quantized in the checkpoint, quantized here" in checkpoint.remarks("fp8")[1]
    assert "2 not quantized in the checkpoint, quantized here" in checkpoint.remarks("fp8-head")[1], "the head, too"
    assert torch.equal(checkpoint.read(parameters(TINY)[f"{Q}.weight"]), original)


def test_a_head_in_fp8_is_dequantized_unless_the_precision_quantizes_it(made, tmp_path):
    def change(tensors, config):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale"] = torch.arange(1, 513).float()[:, None]
        config["quantization_config"]["ignore"].remove("lm_head")

    checkpoint = Checkpoint.open(rewritten(made("per channel"), tmp_path / "checkpoint", change))
    assert ": 1 dequantized once; " in checkpoint.remarks("fp8")[1]
    head = parameters(TINY)["lm_head.weight"]
    values = load_file(tmp_path / "checkpoint" / "model.safetensors")["lm_head.weight"].float()
    numbers = torch.cat([storage.convert(checkpoint, b, "fp8").stored[0][1] for b in storage.blocks(checkpoint, head)])
    assert torch.equal(numbers, (values * torch.arange(1, 513)[:, None]).bfloat16().flatten())
    assert "dequantized" not in checkpoint.remarks("fp8-head")[1]
    stored = [dict(storage.convert(checkpoint, b, "fp8-head").stored) for b in storage.blocks(checkpoint, head)]
    assert torch.equal(torch.cat([part[head.name] for part in stored]).float(), values.flatten())
    assert torch.equal(torch.cat([part[f"{head.name}_scale"] for part in stored]), torch.arange(1, 513).float())


def set_config(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


def set_weights(**changes):
    return lambda tensors, config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


def set_tensor(name, make):
    return lambda tensors, config: tensors.update({name: make(tensors[name])})


REFUSED = {
    "no quantization_config": (
        lambda t, c: c.pop("quantization_config"),
        "config.json does not say how it is quantized",
    ),
    "empty quantization_config": (lambda t, c: c.update(quantization_config={}), "quant_method is None, but only"),
    "quantization_config is a list": (lambda t, c: c.update(quantization_config=[]), "is [], expected an object"),
    "int8": (set_weights(type="int"), "weights.type is 'int', but only 'float' is read"),
    "4 bits": (set_weights(num_bits=4), "weights.num_bits is 4, but only 8 is read"),
    "bits that are a truth": (set_weights(num_bits=True), "weights.num_bits is True"),
    "asymmetric": (set_weights(symmetric=False), "weights.symmetric is False"),
    "groups": (set_weights(strategy="group"), "strategy is 'group', expected"),
    "blocks without a size": (set_weights(strategy="block"), "block_structure is None, expected rows and columns"),
    "unknown key in weights": (set_weights(global_scale=2), "unsupported key 'global_scale'"),
    "packed": (set_config(format="pack-quantized"), "format is 'pack-quantized', expected 'float-quantized'"),
    "sparse": (set_config(sparsity_config={"format": "sparse-24-bitmask"}), "unsupported key 'sparsity_config'"),
    "rotated": (set_config(transform_config={"config_groups": {"u": {}}}), "unsupported key 'transform_config'"),
    "no groups": (set_config(config_groups={}), "has no config_groups"),
    "group that is a text": (
        set_config(config_groups={"group_0": "FP8"}),
        "config_groups.group_0: is 'FP8', expected a",
    ),
    "ignore that is a text": (set_config(ignore="lm_head"), "ignore is 'lm_head', expected a list of module names"),
    "pattern that is none": (set_config(ignore=["re:("]), "is no regular expression"),
    "pattern that never ends": (set_config(ignore=["re:(.*a)*$"]), "is too involved"),
    "too many patterns": (set_config(ignore=["re:.*x"] * 101), "has 101 patterns, more than 100"),
    "ignored all the same": (set_config(ignore=["Linear"]), "config.json does not say how it is quantized"),
    "another target": (
        lambda t, c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["re:.*experts.*"]),
        f"{Q}.weight is F8_E4M3, but config.json does not say how",
    ),
    "no scale": (lambda t, c: t.pop(f"{Q}.weight_scale"), f"{Q}.weight is F8_E4M3 without exactly one of"),
    "two scales": (
        lambda t, c: t.update({f"{Q}.weight_scale_inv": t[f"{Q}.weight_scale"].clone()}),
        f"{Q}.weight is F8_E4M3 without exactly one of",
    ),
    "scales of another kind": (
        set_tensor(f"{Q}.weight_scale", lambda s: s[:1]),
        f"{Q}.weight_scale has shape [1, 1], expected [64, 1] for FP8 per channel",
    ),
    "scales that are integers": (
        set_tensor(f"{Q}.weight_scale", lambda s: s.to(torch.int32)),
        f"{Q}.weight_scale is I32, expected one of",
    ),
    "a scale without its weight": (
        lambda t, c: t.update({"model.norm.weight_scale": torch.ones(64)}),
        "model.norm.weight_scale is unexpected",
    ),
    "norm in FP8": (
        set_tensor("model.norm.weight", lambda w: w.to(torch.float8_e4m3fn)),
        "model.norm.weight is F8_E4M3, expected one of BF16, F16, F32",
    ),
    "another FP8": (
        set_tensor(f"{Q}.weight", lambda w: w.view(torch.uint8).view(torch.float8_e5m2)),
        f"{Q}.weight is F8_E5M2, expected one of",
    ),
    "one expert otherwise": (
        set_tensor("model.layers.2.mlp.experts.5.up_proj.weight", lambda w: w.to(torch.bfloat16)),
        "experts.5.up_proj.weight is BF16, but other experts of its layer are F8_E4M3 per channel",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(made, case, tmp_path):
    change, sentence = REFUSED[case]
    directory = rewritten(made("per channel"), tmp_path / "checkpoint", change)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(directory)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_copy_of_a_tied_head_does_not_count(made, tmp_path):
    def change(tensors, config):
        config["tie_word_embeddings"] = True
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale"] = torch.ones(512, 1)

    checkpoint = Checkpoint.open(rewritten(made("per channel"), tmp_path / "checkpoint", change))
    assert "lm_head.weight" not in parameters(checkpoint.config)


MODELOPT_REFUSED = {
    "NVFP4": ({"quant_algo": "NVFP4"}, "quant_algo is 'NVFP4', but only FP8"),
    "mixed": ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {}}}, "unsupported key 'quantized_layers'"),
    "contradiction": ({"exclude_modules": ["lm_head"]}, "say different things"),
}


@pytest.mark.parametrize("case", MODELOPT_REFUSED)
def test_refuses_of_modelopt(made, case, tmp_path):
    changes, sentence = MODELOPT_REFUSED[case]
    directory = shutil.copytree(made("modelopt, said twice"), tmp_path / "checkpoint")
    table = json.loads((directory / "hf_quant_config.json").read_text())
    table["quantization"] |= changes
    (directory / "hf_quant_config.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=sentence):
        Checkpoint.open(directory)


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_modelopt_file_of_another_checkpoint(made, method, tmp_path):
    layout = {"compressed-tensors": "per channel", "fp8": "fp8 blocks"}[method]
    directory = shutil.copytree(made(layout), tmp_path / "checkpoint")
    shutil.copy(made("modelopt") / "hf_quant_config.json", directory)
    with pytest.raises(InputError, match=f"quant_method is '{method}', but hf_quant_config.json is ModelOpt's"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 3e38])
def test_a_scale_that_is_none_is_refused_when_it_is_read(made, bad, tmp_path):
    def change(tensors, config):
        tensors[f"{Q}.weight_scale"][3, 0] = bad

    checkpoint = Checkpoint.open(rewritten(made("per channel"), tmp_path / "checkpoint", change))
    piece = checkpoint.pieces(parameters(TINY)[f"{Q}.weight"])[0]
    for read in (checkpoint.read_numbers, checkpoint.read_fp8):
        with pytest.raises(InputError, match=r"q_proj.weight has the scale .* at \[3, 0\], expected a positive number"):
            read(piece, 0, 8)


def test_a_nan_is_refused_with_its_place(made, tmp_path):
    def change(tensors, config):
        tensors[f"{Q}.weight"].view(torch.uint8)[6, 2] = 0xFF

    checkpoint = Checkpoint.open(rewritten(made("per channel"), tmp_path / "checkpoint", change))
    piece = checkpoint.pieces(parameters(TINY)[f"{Q}.weight"])[0]
    with pytest.raises(InputError, match=r"q_proj.weight\[6, 2\] is nan"):
        checkpoint.read_fp8(piece, 4, 9)
    assert checkpoint.read_numbers(piece, 4, 9).isnan().nonzero().tolist() == [[2, 2]]
