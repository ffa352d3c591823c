"""What only a TensorRT session has: graphs, profiles, a fixed capacity, the checks before a plan is loaded."""

import dataclasses
import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import real_engine
import toy
from fake_cuda import CudaErrorCode, FakeCuda
from fake_tensorrt import FakeContext, FakeEngine, FakeGpu
from toy import J, ToyBundle, oracle, record_engine, write_bundle, write_engine

from glm_export.runtime import cuda, trt_engine
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import ENGINE_TARGETS
from glm_export.runtime.errors import (
    BackendError,
    GlmExportError,
    InputError,
    IntegrityError,
    ResourceError,
    UsageError,
)
from glm_export.runtime.generate import decode_step, generate, prefill
from glm_export.runtime.open import open_session
from glm_export.runtime.trt_session import TensorRtSession

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [60], [3, 1, 4]]

OpenEngine = Callable[..., TensorRtSession]


@pytest.fixture(params=ENGINE_TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_engine(toy_bundle: ToyBundle, gpu: FakeGpu, target: str) -> OpenEngine:
    def opened(batch: int | None = None, engine: dict[str, Any] | None = None, **choices: Any) -> TensorRtSession:
        bundle = toy_bundle(engine={"target": target, **(engine or {})}, **choices)
        session = open_session(bundle, target=target, batch=batch)
        assert isinstance(session, TensorRtSession)
        return session

    return opened


# Decoding


def test_a_decode_step_is_one_graph(open_engine: OpenEngine, gpu: FakeGpu, target: str) -> None:
    with open_engine() as session:
        prefill(session, PROMPTS)
        decode_step(session, [11, 12, 13])
        gpu.cuda.calls.clear()
        for step in range(3):
            decode_step(session, [21 + step, 22, 23])
        # TensorRT-RTX captures its part by itself: three inputs and the logits are copied around it.
        once = ["cudaMemcpyAsync"] * 4 if target == "tensorrt-rtx" else ["cudaGraphLaunch"]
        assert gpu.cuda.calls == [*once, "cudaStreamSynchronize"] * 3
        assert [context.own_graphs for context in contexts_of(session)] == [target == "tensorrt-rtx", False]


def contexts_of(session: TensorRtSession) -> list[FakeContext]:
    return list(session._contexts)


def test_a_graph_goes_on_after_prefill_reset_and_failed_steps(open_engine: OpenEngine, gpu: FakeGpu) -> None:
    with open_engine(batch=2) as session:
        for _ in range(2):
            session.reset()
            prefill(session, [[1, 2, 3], [4]], 2)
            decode_step(session, [5, 6])
            with pytest.raises(InputError):
                decode_step(session, [5, 61])
            logits = decode_step(session, [7, 8])
            np.testing.assert_allclose(logits[0], oracle([1, 2, 3, 5, 7])[-1], atol=1e-4)
            np.testing.assert_allclose(logits[1], oracle([4, 6, 8])[-1], atol=1e-4)


def test_profiles_and_buffers(open_engine: OpenEngine) -> None:
    with open_engine() as session:
        decode_step(session, [1])
        kept = session._steps[1]
        for size in (4, 2, 3):
            session.step(np.zeros((3, size), np.int64))
        decode_step(session, [1])
        assert set(session._steps) == {1, 3}
        assert session._steps[1] is kept
        decode, chunks = contexts_of(session)
        assert (session._steps[1].context, session._steps[3].context) == (decode, chunks)
        assert (decode.profile, chunks.profile) == (0, 1)
        for context in (decode, chunks):
            for cache in session.contract.caches():
                address = context.addresses[cache.name]
                assert context.addresses[cache.name.replace("_cache.", "_cache_out.")] == address
                assert session._caches[cache.name].address == address


@pytest.mark.parametrize("prefill_limit", [1, 3])
def test_prompts_longer_than_a_step_are_fed_in_chunks(open_engine: OpenEngine, prefill_limit: int) -> None:
    with open_engine(engine={"prefill": prefill_limit}) as session:
        assert session.max_step_tokens == prefill_limit
        with pytest.raises(UsageError, match=rf"takes at most {prefill_limit} new tokens per row, not 4: feed them in"):
            session.step(np.zeros((3, 4), np.int64))
        assert session.length.tolist() == [0, 0, 0]
        results = generate(session, PROMPTS, max_new_tokens=4, stop_ids=())
        assert [result.tokens for result in results] == [tuple(toy.greedy(prompt, 4)) for prompt in PROMPTS]


def test_fp8_cache(open_engine: OpenEngine) -> None:
    engine = {"cache_dtype": "float8_e4m3fn", "plan": {"aliases": {}}}
    with open_engine(precision="bf16", engine=engine) as session:
        logits = prefill(session, PROMPTS, 3)
        texts = [list(prompt) for prompt in PROMPTS]
        for token in (11, 22, 33):
            for row, text in enumerate(texts):
                want = oracle(text, "bf16", cache_dtype="float8_e4m3fn")[-1]
                np.testing.assert_allclose(logits[row], want, atol=1e-4)  # float32 sums, as everywhere here
            logits = decode_step(session, [token] * 3).copy()
            texts = [[*text, token] for text in texts]
        cache = session.cache("k_cache.0")
        assert (cache.dtype, cache.shape) == (ml_dtypes.float8_e4m3fn, (3, J, 32, toy.A))
        written = cache.view(np.uint8) != 0
        assert [bool(written[row, :, : len(text)].any(-1).all()) for row, text in enumerate(texts)] == [True] * 3
        assert not written[0, :, 10:].any()


def test_logits_outlive_the_session(open_engine: OpenEngine, gpu: FakeGpu) -> None:
    with open_engine() as session:
        output = session.step(np.array([[1], [2], [3]]))
        want = output.logits.copy()
    np.testing.assert_array_equal(output.logits, want)
    del output, session
    gc.collect()
    assert gpu.cuda.leftovers() == {}


def test_sizes_default_to_what_bundle_and_engine_both_have(toy_bundle: ToyBundle, gpu: FakeGpu, target: str) -> None:
    for rows, expected in ((2, 2), (4, 3)):
        bundle = toy_bundle(engine={"target": target, "batch": rows, "capacity": 48})
        with open_session(bundle, target=target) as session:
            assert (session.batch, session.capacity) == (expected, 48)
        with open_session(bundle, target=target, batch=1, capacity=48, device="cuda") as session:
            assert session.batch == 1


# Failures while running


def test_a_step_that_the_library_refuses(
    open_engine: OpenEngine, gpu: FakeGpu, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine() as session:
        prefill(session, PROMPTS)
        for reason, error, message in (
            ("no kernel image", BackendError, "failed when it ran a step .*no kernel image.*: run `glm-export verify`"),
            ("CUDA out of memory", ResourceError, "ran out of GPU memory when it ran a step .*: use fewer rows"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(FakeContext, "execute_async_v3", lambda self, _, text=reason: self._refuse(text))
                with pytest.raises(error, match=rf"^{target} 11\.4\.0\.7 {message}") as raised:
                    decode_step(session, [1, 1, 1])
            assert "\n" not in str(raised.value)
            assert session.length.tolist() == [7, 1, 3]
        np.testing.assert_allclose(decode_step(session, [1, 1, 1])[1], oracle([60, 1])[-1], atol=1e-4)


def test_what_a_failed_step_wrote_is_cleared(open_engine: OpenEngine, gpu: FakeGpu) -> None:
    with open_engine() as session:
        prefill(session, PROMPTS)
        before = {cache.name: session.cache(cache.name) for cache in session.contract.caches()}
        assert before["k_cache.0"][1, :, 1:7].all()  # of padding
        for buffer in session._caches.values():
            memory = gpu.cuda.view(buffer.address, buffer.nbytes)
            assert memory is not None
            memory.view(np.float32).reshape(session._cache_shape)[1, :, 1:] = np.nan
        with pytest.raises(GlmExportError, match="not finite"):
            decode_step(session, [1, 1, 1])
        for name, cache in before.items():
            for row, length in enumerate(session.length):
                cache[row, :, length:] = 0
            np.testing.assert_array_equal(session.cache(name), cache)


def test_a_device_that_fails_closes_the_session(open_engine: OpenEngine, gpu: FakeGpu) -> None:
    session = open_engine()
    for _ in range(2):
        decode_step(session, [1, 1, 1])
    gpu.cuda.broken = CudaErrorCode.cudaErrorIllegalAddress
    with pytest.raises(BackendError, match=r"^cuda\w+ failed \(an illegal memory access was encountered\): run the"):
        decode_step(session, [1, 1, 1])
    with pytest.raises(UsageError, match="closed"):
        decode_step(session, [1, 1, 1])
    del session
    gc.collect()
    assert gpu.cuda.leftovers() == {}


def test_without_a_graph_decoding_goes_on_and_says_so(
    open_engine: OpenEngine,
    gpu: FakeGpu,
    target: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = FakeContext.execute_async_v3

    def run_and_wait(self: FakeContext, stream: int) -> bool:
        return run(self, stream) and not self.cuda.cudaStreamSynchronize(stream)[0]

    monkeypatch.setattr(FakeContext, "execute_async_v3", run_and_wait)
    with open_engine() as session, caplog.at_level(logging.WARNING):
        prefill(session, PROMPTS)
        for token in (1, 2, 3):
            logits = decode_step(session, [token] * 3)
        np.testing.assert_allclose(logits[1], oracle([60, 1, 2, 3])[-1], atol=1e-4)
        assert session.length.tolist() == [10, 4, 6]
    if target == "tensorrt":
        gpu.library(target).logger.take_errors()
        [record] = caplog.records  # said once
        assert record.message.startswith("Decoding runs without a CUDA graph, and slower: ")
    else:
        assert not caplog.records


# Opening


def refused(bundle: Bundle, target: str, error: type[Exception], message: str, **arguments: Any) -> None:
    with pytest.raises(error, match=message) as raised:
        open_session(bundle, target=target, **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 16}, r"capacity is 16, but the .* engine was built for exactly 32: leave it out, or build one"),
        ({"capacity": 64}, "capacity is 64, but .* --capacity 64`"),
        ({"batch": 5}, "batch is 5, but the .* engine was built for at most 4: use fewer rows, .* --max-batch 5`"),
        ({"batch": 0}, "batch is 0"),
        ({"threads": 2}, "threads is 2, but .* runs on the GPU"),
        (
            {"cache_dtype": "bfloat16"},
            "cache_dtype is bfloat16, but the .* was built for KV caches in float32: leave it",
        ),
        ({"device": "cpu"}, "There is no device 'cpu' for .*: its engines run on cuda"),
    ],
)
def test_wrong_openings(
    toy_bundle: ToyBundle, gpu: FakeGpu, target: str, arguments: dict[str, Any], message: str
) -> None:
    refused(toy_bundle(engine={"target": target}), target, UsageError, message, **arguments)
    assert gpu.library(target).deserialized == 0


def test_a_bundle_without_this_engine(toy_bundle: ToyBundle, gpu: FakeGpu, target: str) -> None:
    [other] = {*ENGINE_TARGETS} - {target}
    for bundle in (toy_bundle(), toy_bundle(engine={"target": other})):
        refused(bundle, target, InputError, f"has no engine for {target}: add one with `glm-export engine")


@pytest.mark.parametrize(
    ("info", "error", "message"),
    [
        (
            {"library_version": "11.3.0"},
            BackendError,
            r"built with .* 11\.3\.0 and the installed version is 11\.4\.0\.7",
        ),
        ({"compute_capabilities": ("9.0", "10.0")}, BackendError, r"capability 9\.0, 10\.0, and the Toy GPU has 8\.9"),
        ({"graph_sha256": "0" * 64}, IntegrityError, r"was built from another model\.onnx: build it again with"),
        (
            {"layers": {"MoERouter": 1, "FP8CacheWrite": 0}},
            BackendError,
            "plugins MoERouter, and .* without their CUDA",
        ),
        ({"compute_dtype": "float16"}, IntegrityError, "it computes in float16, not float32"),
        ({"cache_dtype": "bfloat16"}, IntegrityError, r"k_cache\.0 is DataType.FLOAT, not bfloat16"),
        ({"capacity": 33}, IntegrityError, r"k_cache\.0 has shape \[-1, 2, 32, 8\], expected \[B,2,C,8\]"),
        ({"batch": 5}, IntegrityError, r"dimension 0 of input_ids is 1\.\.4 in profile 0, expected 1\.\.5"),
        ({"prefill": 8}, IntegrityError, r"dimension 1 of input_ids is 1\.\.16 in profile 1, expected 1\.\.8"),
        ({"plan": {"profiles": 1}}, IntegrityError, "it has 1 optimization profiles, not 2"),
        ({"plan": {"aliases": {}}}, IntegrityError, r"k_cache_out\.0 shares its buffer with None, not with k_cache\.0"),
        ({"plan": {"location": {"length": 1}}}, IntegrityError, "length lies in host memory"),
        (
            {"plan": {"host_code": True}},
            BackendError,
            r"failed when it loaded .*model\.plan .*host code is not allowed",
        ),
    ],
)
def test_an_engine_that_does_not_fit(
    tmp_path: Path, gpu: FakeGpu, target: str, monkeypatch: pytest.MonkeyPatch, info: Any, error: Any, message: str
) -> None:
    monkeypatch.setattr(trt_engine, "cuda_library", lambda: None)
    directory = write_bundle(tmp_path / "toy")
    in_plan = {"batch": 4, "capacity": 32, "prefill": 16}
    write_engine(directory, target, **({"plan": info["plan"]} if "plan" in info else {}))
    if "plan" not in info:
        engine = json.loads((directory / f"engines/{target}/engine.json").read_text())
        assert {key: engine[key] for key in in_plan} == in_plan
        (directory / f"engines/{target}/engine.json").write_text(json.dumps(engine | info))
        record_engine(directory, target)
    refused(Bundle.open(directory), target, error, message)
    gc.collect()
    assert gpu.cuda.leftovers() == {}


def test_a_plan_of_another_model(tmp_path: Path, gpu: FakeGpu, target: str) -> None:
    directory = write_bundle(tmp_path / "toy")
    other = write_bundle(tmp_path / "other", outputs=("hidden_states",))
    for path in (directory, other):
        write_engine(path, target)
    plan = f"engines/{target}/model.plan"
    for into, source, message in (
        (directory, other, r"hidden_states\.0 is not expected"),
        (other, directory, r"hidden_states\.0 is missing"),
    ):
        original = (into / plan).read_bytes()
        info = json.loads((into / plan).with_name("engine.json").read_text())
        (into / plan).write_bytes((source / plan).read_bytes())
        (into / plan).with_name("engine.json").write_text(
            json.dumps(info | {"plan_bytes": (into / plan).stat().st_size})
        )
        record_engine(into, target)
        refused(Bundle.open(into), target, IntegrityError, message)
        (into / plan).write_bytes(original)


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_changed_plan_byte_never_reaches_the_library(
    tmp_path: Path, gpu: FakeGpu, target: str, gpus: int, place: float
) -> None:
    gpu.cuda.gpus = gpus
    directory = write_bundle(tmp_path / "toy")
    write_engine(directory, target)
    bundle = Bundle.open(directory)
    path = directory / f"engines/{target}/model.plan"
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    refused(bundle, target, IntegrityError, r"model\.plan has sha256 .*, the manifest says")
    path.write_bytes(data[:-1])
    refused(bundle, target, IntegrityError, r"model\.plan has \d+ bytes, the manifest says")
    assert gpu.library(target).deserialized == 0


def test_a_plan_that_is_garbage_with_the_right_hash(tmp_path: Path, gpu: FakeGpu, target: str) -> None:
    directory = write_bundle(tmp_path / "toy")
    info = write_engine(directory, target)
    path = directory / f"engines/{target}/model.plan"
    path.write_bytes(b"\xff" * 100)
    dataclasses.replace(info, plan_bytes=100).write(path.parent)
    record_engine(directory, target)
    refused(Bundle.open(directory), target, BackendError, r"failed when it loaded .*model\.plan \(.*bad plan")


def test_no_gpu(toy_bundle: ToyBundle, gpu: FakeGpu, target: str) -> None:
    gpu.cuda.gpus = 0
    message = r"There is no NVIDIA GPU that can be used \(CUDA driver version is insufficient .*use the target onnxr"
    refused(toy_bundle(engine={"target": target}), target, BackendError, message)
    assert gpu.library(target).deserialized == 0


def test_no_cuda_python(toy_bundle: ToyBundle, gpu: FakeGpu, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError

    monkeypatch.setattr(cuda, "_cuda", absent)
    message = rf'Running an engine needs the library cuda-python: pip install "glm-export\[{target}\]"'
    refused(toy_bundle(engine={"target": target}), target, BackendError, message)


def test_too_little_gpu_memory(toy_bundle: ToyBundle, gpu: FakeGpu, target: str) -> None:
    bundle = toy_bundle(engine={"target": target})
    plan = bundle.manifest.files[f"engines/{target}/model.plan"].size
    caches = 3 * J * 32 * toy.A * 4 * 2 * toy.L
    gpu.cuda.memory = plan + caches - 1
    refused(
        bundle, target, ResourceError, r"The engine needs 0\.0 GiB .* the Toy GPU has 0\.0 GiB free: use fewer rows"
    )
    assert gpu.library(target).deserialized == 0


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMallocHost", "cudaMemset", "cudaStreamCreateWithFlags"])
def test_whatever_fails_while_opening_everything_is_freed(
    toy_bundle: ToyBundle, gpu: FakeGpu, target: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of that name fails once."""
    bundle = toy_bundle(engine={"target": target})
    real: Callable[..., Any] = getattr(FakeCuda, call)
    countdown = failures = 0

    def fail(self: FakeCuda, *arguments: Any) -> Any:
        nonlocal countdown
        countdown -= 1
        return (CudaErrorCode.cudaErrorMemoryAllocation, None) if countdown == -1 else real(self, *arguments)

    def use() -> str:
        try:
            with open_session(bundle, target=target) as session:
                prefill(session, PROMPTS)
                decode_step(session, [1, 2, 3])
        except (ResourceError, BackendError) as error:
            return str(error)
        return ""

    monkeypatch.setattr(FakeCuda, call, fail)
    while sentence := use():
        assert "out of memory" in sentence or "no room" in sentence
        assert "\n" not in sentence
        assert gpu.cuda.leftovers() == {}, f"{call} number {failures}"
        failures += 1
        countdown = failures
    assert failures >= 1


@pytest.mark.parametrize(
    "method", ["create_execution_context", "set_optimization_profile_async", "set_input_shape", "set_tensor_address"]
)
def test_whatever_the_library_refuses_while_opening(
    toy_bundle: ToyBundle, gpu: FakeGpu, target: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = FakeEngine if method == "create_execution_context" else FakeContext
    monkeypatch.setattr(kind, method, lambda *_: None)
    with (
        pytest.raises(BackendError, match=rf"{target} .* failed when it .* \(it gave no reason\)"),
        open_session(toy_bundle(engine={"target": target}), target=target) as session,
    ):
        decode_step(session, [1])
    session = None
    gc.collect()
    assert gpu.cuda.leftovers() == {}


@pytest.mark.skipif(bool(real_engine.missing("tensorrt-rtx", running=False)), reason="tensorrt-rtx is not installed")
@pytest.mark.skipif(not real_engine.missing("tensorrt-rtx"), reason="here the engine runs")
def test_a_real_engine_is_checked_up_to_the_gpu_without_one(tmp_path: Path) -> None:
    """The engine that the tests of all sessions run where there is a GPU builds everywhere."""
    directory = write_bundle(tmp_path / "toy")
    info = real_engine.write_real_engine(directory, "tensorrt-rtx", compute_capabilities=("8.9",))
    bundle = Bundle.open(directory)
    refused(
        bundle, "tensorrt-rtx", BackendError, "There is no NVIDIA GPU that can be used|needs the library cuda-python"
    )
    refused(bundle, "tensorrt-rtx", UsageError, "capacity is 16", capacity=16)
    plan = directory / "engines/tensorrt-rtx/model.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    refused(bundle, "tensorrt-rtx", IntegrityError, r"model\.plan has sha256")
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    dataclasses.replace(info, library_version="1.6.0.0").write(plan.parent)
    record_engine(directory, "tensorrt-rtx")
    refused(
        Bundle.open(directory), "tensorrt-rtx", BackendError, r"was built with tensorrt-rtx 1\.6\.0\.0 and the inst"
    )


def test_a_real_engine_decodes(tmp_path: Path, target: str) -> None:
    """Where this runs, so do all tests of test_session.py and test_generate.py."""
    if reason := real_engine.missing(target):
        pytest.skip(reason)
    directory = write_bundle(tmp_path / "toy")
    real_engine.write_real_engine(directory, target, compute_capabilities=(cuda.gpu().compute_capability,))
    with open_session(Bundle.open(directory), target=target) as session:
        results = generate(session, PROMPTS, max_new_tokens=8, stop_ids=(), prefill_chunk=3)
        assert isinstance(session, TensorRtSession)
        assert (session._steps[1].graph is not None) == (target == "tensorrt")
    assert [result.tokens for result in results] == [tuple(toy.greedy(prompt, 8)) for prompt in PROMPTS]
