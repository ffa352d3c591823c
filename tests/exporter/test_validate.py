from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from glm_export.exporter.build import build
from glm_export.exporter.progress import Reporter
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.validate import tolerances, validate
from glm_export.exporter.weights import reference_of_bundle
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import InputError, UsageError
from glm_export.runtime.manifest import FileRecord

QUIET = Reporter(quiet=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "fp8-head"])
@pytest.mark.parametrize("kernels", ["portable", "scalar", ""])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_precision_is_within_its_tolerance(bundle_of, precision, kernels, seed, monkeypatch):
    monkeypatch.setenv("GLM_EXPORT_CPU", kernels)
    report = validate(bundle_of(precision), seed=seed, reporter=QUIET)
    assert report, "\n".join(report.lines())
    assert report.engine.max_abs.shape == (17, 4)
    assert report.prompt_lengths == (24, 16, 9, 1)
    assert report.drift is not None
    if precision == "fp32":
        assert report.engine.max_abs.max() < 1e-4
        assert report.engine.summary()["greedy_tokens_agreed"] == 17 * 4
    else:
        # Rounding is there, and of the size that the precision has.
        assert report.drift.summary()["relative_l2_median"] > report.engine.summary()["relative_l2_median"]


@pytest.mark.parametrize(
    ("precision", "cache_dtype"), [("fp32", "bfloat16"), ("bf16", "float32"), ("fp16", "bfloat16"), ("fp8", "float32")]
)
@pytest.mark.parametrize("kernels", ["portable", ""])
def test_caches_of_another_dtype_are_within_their_tolerance(bundle_of, precision, cache_dtype, kernels, monkeypatch):
    # The reference rounds what it caches alike: again only the order of sums differs, and what that turns around.
    monkeypatch.setenv("GLM_EXPORT_CPU", kernels)
    report = validate(bundle_of(precision), cache_dtype=cache_dtype, steps=4, drift=False, reporter=QUIET)
    assert report, "\n".join(report.lines())
    assert report.to_dict()["cache_dtype"] == cache_dtype


def test_the_report_is_written_and_is_json(bundle_of):
    bundle = bundle_of("fp8")
    report = validate(bundle, steps=3, reporter=QUIET)
    written = json.loads((bundle.directory / "reports/validation.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert [step["step"] for step in written["engine"]["per_step"]] == [0, 1, 2, 3]
    assert bundle.verify(), "a report does not damage a bundle"


def _damaged(bundle: Bundle, out: Path, change) -> Bundle:
    """A copy of a bundle whose graph was changed, with a manifest that says so."""
    shutil.copytree(bundle.directory, out, ignore=shutil.ignore_patterns("reports"))
    model = onnx.load(out / "model.onnx", load_external_data=False)
    change(model)
    data = model.SerializeToString()
    (out / "model.onnx").write_bytes(data)
    import hashlib

    files = dict(bundle.manifest.files)
    files["model.onnx"] = FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (out / "manifest.json").unlink()
    dataclasses.replace(bundle.manifest, files=files).write(out)
    return Bundle.open(out)


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


def drop_correction_bias(model):
    """What the one other exporter that knows this model does."""
    zero = onnx.helper.make_tensor("zero_bias", onnx.TensorProto.FLOAT, [8], [0.0] * 8)
    model.graph.initializer.append(zero)
    for node in model.graph.node:
        if node.op_type == "MoERouter":
            node.input[1] = "zero_bias"


def forget_routed_scaling(model):
    for node in model.graph.node:
        if node.op_type == "MoERouter":
            _attribute(node, "routed_scaling_factor").f = 1.0


def rotate_too_much(model):
    for node in model.graph.node:
        if node.op_type == "CachedAttention":
            _attribute(node, "scale").f *= 1.05


def swap_gate_and_up(model):
    node = _node(model, "model.layers.0.mlp/SiluMul")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def skip_a_qk_norm(model):
    node = _node(model, "model.layers.2.self_attn/CachedAttention")
    norm = next(n for n in model.graph.node if n.output[0] == node.input[1])
    node.input[1] = norm.input[0]


def ignore_write_index(model):
    """Every step believes that the cache is empty: prefill is right, decoding is not."""
    for node in model.graph.node:
        if node.op_type == "CachedAttention":
            node.input[7] = "zeros"
    shape = onnx.helper.make_node("Shape", ["write_index"], ["zeros_shape"])
    value = onnx.helper.make_tensor("v", onnx.TensorProto.INT64, [1], [0])
    zeros = onnx.helper.make_node("ConstantOfShape", ["zeros_shape"], ["zeros"], value=value)
    model.graph.node.insert(0, zeros)
    model.graph.node.insert(0, shape)


def take_the_first_token_for_the_last(model):
    """Wrong only for rows with more than one new token."""
    node = _node(model, "Clip")
    node.op_type = "Mul"
    value = onnx.helper.make_tensor("zero_i", onnx.TensorProto.INT64, [], [0])
    model.graph.initializer.append(value)
    node.input[1] = "zero_i"


def quantize_weights_only(model):
    """W8A16 in place of W8A8: close, but not what the precision promises."""
    helper = next(f for f in model.functions if f.name == "FakeQuantizeRows")
    del helper.node[:]
    helper.node.append(onnx.helper.make_node("Identity", ["x_TI"], ["x_hat_TI"]))


@pytest.mark.parametrize(
    "mistake",
    [
        drop_correction_bias,
        forget_routed_scaling,
        rotate_too_much,
        swap_gate_and_up,
        skip_a_qk_norm,
        ignore_write_index,
        take_the_first_token_for_the_last,
        quantize_weights_only,
    ],
)
def test_a_wrong_engine_fails(bundle_of, tmp_path, mistake, monkeypatch):
    """Mistakes that exporters make, each of which leaves a graph that runs. FP8, where tolerances are widest."""
    if mistake is quantize_weights_only:  # a mistake in a function body, which kernels do not look at
        monkeypatch.setenv("GLM_EXPORT_CPU", "portable")
    bundle = _damaged(bundle_of("fp8"), tmp_path / "bundle", mistake)
    report = validate(bundle, drift=False, reporter=QUIET)
    assert not report, "\n".join(report.lines())


def test_the_twin_is_the_same_model(bundle_of):
    """In float32 the permuted twin differs by summation order alone, so a wrong permutation could not hide."""
    for precision, bound in (("fp32", 1e-5), ("fp8", 1.0)):
        bundle = bundle_of(precision)
        ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
        with torch.no_grad():
            one = reference_of_bundle(bundle)(ids).logits
            two = reference_of_bundle(bundle, permute_seed=5)(ids).logits
        assert (one - two).norm() / one.norm() < bound
        assert not torch.equal(one, two), "nothing was permuted"


def test_streamed_and_resident_references_are_the_same(bundle_of):
    bundle = bundle_of("fp8")
    ids = torch.tensor([[7, 7, 7, 400]])
    streamed = reference_of_bundle(bundle, stream=True)
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, reference_of_bundle(bundle)(ids).logits)
        assert torch.equal(streamed(ids).logits, streamed(ids).logits), "a second pass reads the weights again"
    assert all(p.is_meta for p in streamed.parameters()), "weights were kept"


def test_tolerances_grow_with_depth_and_with_roundoff():
    for precision in ("fp32", "bf16", "fp16", "fp8", "fp8-head"):
        assert tolerances(precision, 92)[0].bound > tolerances(precision, 4)[0].bound
    bounds = [tolerances(precision, 46)[1].bound for precision in ("fp32", "fp16", "bf16", "fp8", "fp8-head")]
    assert bounds == sorted(bounds)


def test_tensorrt_rounds_at_more_places():
    assert tolerances("fp32", 46, "tensorrt") == tolerances("fp32", 46)
    for precision in ("bf16", "fp16", "fp8"):
        more, fewer = tolerances(precision, 46, "tensorrt")[0].bound, tolerances(precision, 46)[0].bound
        assert fewer < more < (15 / 2) ** 0.5 * fewer


def test_all_logits_and_embeddings_as_input_validate_too(tiny_checkpoint, tmp_path):
    recipe = load_recipe(
        "tiny", {"precision": "fp32", "export.logits": "all", "export.inputs_embeds": True, "validate.steps": 4}
    )
    build(Checkpoint.open(tiny_checkpoint), recipe, tmp_path / "bundle", QUIET)
    report = validate(Bundle.open(tmp_path / "bundle"), reporter=QUIET)
    assert report, "\n".join(report.lines())


def test_drift_needs_the_very_checkpoint(bundle_of, tiny_checkpoint, tmp_path):
    bundle = bundle_of("fp8")
    with pytest.raises(InputError, match="--no-drift"):
        validate(bundle, checkpoint=tmp_path / "gone", reporter=QUIET)
    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    with pytest.raises(InputError, match="not the checkpoint this bundle was built from"):
        validate(bundle, checkpoint=tmp_path / "other", reporter=QUIET)
    shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    assert validate(bundle, checkpoint=tmp_path / "moved", steps=1, reporter=QUIET)


@pytest.mark.parametrize("numbers", [{"prompts": 0}, {"steps": 0}, {"prompt_tokens": 0}, {"seed": -1}])
def test_numbers_that_would_compare_nothing_are_refused(bundle_of, numbers):
    with pytest.raises(UsageError, match="expected 1 or more"):
        validate(bundle_of("fp8"), reporter=QUIET, **numbers)


def test_one_prompt_of_one_token_is_enough(bundle_of):
    report = validate(bundle_of("fp32"), prompts=1, prompt_tokens=1, steps=1, reporter=QUIET)
    assert report
    assert np.isfinite(report.engine.kl).all()
