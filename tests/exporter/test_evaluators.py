"""One model.onnx: the ONNX reference evaluator, onnxruntime (stock, and with our kernels) and PyTorch agree."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx_evaluator import OnnxEvaluator

from glm_export.exporter.validate import tolerances
from glm_export.exporter.weights import reference_of_bundle
from glm_export.plugins.library import CPU_VARIABLE, PORTABLE, cpu_library
from glm_export.runtime.generate import decode_step, generate, prefill
from glm_export.runtime.open import open_session

CAPACITY = 80


@pytest.fixture(params=[PORTABLE, ""], ids=["stock", "kernels"], autouse=True)
def onnxruntime_form(request, monkeypatch):
    """Every test here runs once with the function bodies in stock onnxruntime, and once with our kernels."""
    assert cpu_library() is not None, "the kernels were not built"
    monkeypatch.setenv(CPU_VARIABLE, request.param)


def onnx_evaluator(bundle, batch):
    return OnnxEvaluator(onnx.load(bundle.model_path), bundle.manifest.contract, batch=batch, capacity=CAPACITY)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "fp8-head"])
def test_evaluators_agree_on_ragged_prefill_and_decode(bundle_of, precision):
    bundle = bundle_of(precision)
    prompts = [[5, 17, 300, 44, 2], [101], [7, 8, 9]]
    padded = np.array([p + [0] * (5 - len(p)) for p in prompts])
    counts = np.array([len(p) for p in prompts])

    evaluator = onnx_evaluator(bundle, batch=3)
    model = reference_of_bundle(bundle)
    caches = model.empty_caches(3, CAPACITY)
    results = {"onnx": [evaluator.step(padded, counts)], "onnxruntime": [], "torch": []}

    def torch_step(tokens, before, after):
        nonlocal caches
        with torch.no_grad():
            last = torch.tensor(after - before - 1)[:, None]
            output = model(
                torch.tensor(tokens),
                caches=caches,
                write_index=torch.tensor(before),
                length=torch.tensor(after),
                logits_to_keep=last,
            )
        caches = output.caches
        return output.logits[:, 0].numpy()

    results["torch"].append(torch_step(padded, counts * 0, counts))
    with open_session(bundle, batch=3, capacity=CAPACITY) as session:
        results["onnxruntime"].append(prefill(session, prompts).copy())
        for step in range(3):
            token = results["torch"][-1].argmax(-1)
            results["onnx"].append(evaluator.step(token[:, None], np.ones(3, np.int64)))
            results["onnxruntime"].append(decode_step(session, token.tolist()).copy())
            results["torch"].append(torch_step(token[:, None], counts + step, counts + step + 1))

    want = np.stack(results["torch"])
    # 1e-4 of the logits' size of about 1 is what the project promises in float32; else the derived bound of a row.
    bound = 1e-4 if precision == "fp32" else tolerances(precision, 4)[1].bound
    for name in ("onnx", "onnxruntime"):
        got = np.stack(results[name])
        assert got.dtype == np.float32
        error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
        assert np.median(error) <= bound, (name, error)
        if precision == "fp32":
            assert np.abs(got - want).max() < 1e-4, name


@pytest.mark.parametrize(
    ("precision", "cache_dtype"), [("fp32", "bfloat16"), ("bf16", "float32"), ("fp16", "bfloat16"), ("fp8", "float32")]
)
def test_a_session_keeps_its_caches_in_the_dtype_it_is_asked_for(bundle_of, precision, cache_dtype):
    bundle = bundle_of(precision)
    tokens = [[5, 17, 300, 44, 2]]
    with open_session(bundle, batch=1, capacity=CAPACITY, cache_dtype=cache_dtype) as session:
        prefilled = prefill(session, tokens).copy()
        got = np.stack([prefilled, decode_step(session, [7]).copy()])
        cached = {binding.name: session.cache(binding.name).copy() for binding in session.contract.caches()}
    model = reference_of_bundle(bundle)
    ids = torch.tensor([[*tokens[0], 7]])
    with torch.no_grad():
        caches = model.empty_caches(1, CAPACITY, getattr(torch, cache_dtype))
        output = model(ids, caches=caches, logits_to_keep=torch.tensor([4, 5]))
    want = output.logits.transpose(0, 1).numpy()
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() <= tolerances(precision, 4, cache_dtype=cache_dtype)[1].bound
    assert {array.dtype.name for array in cached.values()} == {cache_dtype}
    # Layer 0 comes before every sum that may differ but that of its projection: its keys are those of the reference, up
    # to a rounding of the compute dtype or of the cache's, both within 2^-8.
    keys = output.caches[0][0].float().numpy()
    np.testing.assert_allclose(
        cached["k_cache.0"].astype(np.float32), keys, rtol=2**-8, atol=2**-8 * np.abs(keys).max()
    )
    if cache_dtype == "float32":  # nothing is rounded on the way to the cache
        assert (cached["k_cache.0"] != cached["k_cache.0"].astype(np.float16)).any()


def test_greedy_tokens_are_the_same_over_64_steps(bundle_of):
    """Float32: onnxruntime with its in-place cache against the reference with its functional one."""
    bundle = bundle_of("fp32")
    prompts = [[5, 17, 300, 44, 2], [101, 55], [9] * 11]
    with open_session(bundle, batch=3, capacity=CAPACITY) as session:
        engine = generate(session, prompts, max_new_tokens=64, stop_ids=())
    model = reference_of_bundle(bundle)
    for prompt, generated in zip(prompts, engine, strict=True):
        caches, tokens, new = model.empty_caches(1, CAPACITY), [], prompt
        with torch.no_grad():
            for _ in range(64):
                done = len(prompt) + len(tokens) - len(new)
                output = model(torch.tensor([new]), caches=caches, write_index=torch.tensor([done]), logits_to_keep=1)
                caches, new = output.caches, [int(output.logits.argmax())]
                tokens += new
        assert list(generated.tokens) == tokens


def test_greedy_tokens_of_the_onnx_evaluator(bundle_of):
    bundle = bundle_of("fp32")
    with open_session(bundle, batch=1, capacity=CAPACITY) as session:
        engine = generate(session, [[5, 17, 300]], max_new_tokens=8, stop_ids=())[0]
    evaluator = onnx_evaluator(bundle, batch=1)
    logits, tokens = evaluator.step([[5, 17, 300]], np.array([3])), []
    for _ in range(8):
        tokens.append(int(logits[0].argmax()))
        logits = evaluator.step([[tokens[-1]]], np.array([1]))
    assert list(engine.tokens) == tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "fp8-head"])
def test_the_cache_is_updated_in_place(bundle_of, precision):
    """The session's own memory, where the step was told to read the cache, holds the new keys after it."""
    with open_session(bundle_of(precision), batch=2, capacity=32) as session:
        cache = session.cache("k_cache.3")
        address = cache.ctypes.data
        assert not cache.any()
        prefill(session, [[1, 2, 3], [4]])
        decode_step(session, [5, 6])
        assert cache.ctypes.data == address
        filled = cache.astype(np.float32).any(axis=(1, 3))
    assert filled[0, :4].all()
    assert filled[1, :2].all()
    assert not filled[0, 4:].any()
