import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import toy
from toy import J, V, contract_of, oracle, record, write_bundle

from glm_export.runtime import ort_session
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import (
    AccuracyError,
    BackendError,
    InputError,
    IntegrityError,
    ResourceError,
    UsageError,
)
from glm_export.runtime.generate import decode_step, prefill
from glm_export.runtime.open import open_session
from glm_export.runtime.session import Session

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-4, "bf16": 1e-4}  # the oracle rounds its cache to the same dtype
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [60], [3, 1, 4]]
OpenToy = Callable[..., Session]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    made: dict[str, Bundle] = {}

    def bundle(**choices: Any) -> Bundle:
        key = repr(sorted(choices.items()))
        if key not in made:
            made[key] = Bundle.open(write_bundle(tmp_path_factory.mktemp("bundle") / "toy", **choices))
        return made[key]

    return bundle


@pytest.fixture
def open_toy(bundles: Callable[..., Bundle]) -> OpenToy:
    def opened(batch: int | None = None, capacity: int | None = None, **choices: Any) -> Session:
        return open_session(bundles(**choices), batch=batch, capacity=capacity, threads=1)

    return opened


def ids(*rows: list[int]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int64)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 512])
def test_ragged_chunked_prefill_and_decode_equal_the_whole_sequence(
    open_toy: OpenToy, precision: str, chunk: int
) -> None:
    with open_toy(precision=precision) as session:
        logits = prefill(session, PROMPTS, chunk)
        texts = [list(prompt) for prompt in PROMPTS]
        for token in (11, 22, 33):
            for row, text in enumerate(texts):
                np.testing.assert_allclose(logits[row], oracle(text, precision)[-1], atol=TOLERANCE[precision])
            logits = decode_step(session, [token + row for row in range(3)]).copy()
            texts = [[*text, token + row] for row, text in enumerate(texts)]
        assert session.length.tolist() == [len(text) for text in texts]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_logits_and_optional_outputs(open_toy: OpenToy, precision: str) -> None:
    outputs = ("hidden_states", "router_logits", "attentions")
    with open_toy(precision=precision, logits="all", outputs=outputs) as session:
        counts = np.array([7, 1, 3])
        output = session.step(ids(*PROMPTS), counts)
        assert output.logits.shape == (3, 7, V)
        for row, prompt in enumerate(PROMPTS):
            np.testing.assert_allclose(output.logits[row, : len(prompt)], oracle(prompt, precision), atol=1e-4)
        names = [f"hidden_states.{i}" for i in range(3)] + ["router_logits.1", "attentions.0", "attentions.1"]
        assert list(output.extras) == names
        last = output.extras["hidden_states.2"]
        assert last.dtype == (ml_dtypes.bfloat16 if precision == "bf16" else np.float32)
        atol = 0.3 if precision == "bf16" else 1e-4
        np.testing.assert_allclose(last.astype(np.float32) @ toy.weights()["head"], output.logits, atol=atol)
        assert output.extras["router_logits.1"].shape == (21, 4)
        assert output.extras["attentions.0"].shape == (3, toy.H, 7, 32)
        kept = last.copy()
        session.step(ids(*PROMPTS), counts)
        np.testing.assert_array_equal(last, kept)  # extras are copies


def test_embeddings_instead_of_ids(open_toy: OpenToy) -> None:
    embeds = toy.weights()["embed"][ids([1, 2], [3, 4])]
    for precision in ("fp32", "bf16"):
        with open_toy(batch=2, precision=precision, inputs_embeds=True) as session:
            logits = session.step(embeds).logits
            atol = 1e-4 if precision == "fp32" else 0.3  # bfloat16 rounds the embeddings
            np.testing.assert_allclose(logits, [oracle([1, 2])[-1], oracle([3, 4])[-1]], atol=atol)
            with pytest.raises(UsageError, match="float64, expected float32"):
                session.step(embeds.astype(np.float64))
            with pytest.raises(UsageError, match=r"shape \[2, 2\], expected \[2,S,16\]"):
                session.step(ids([1, 2], [3, 4]))
            with pytest.raises(InputError, match="not a finite number"):
                session.step(np.full_like(embeds, np.nan))
            assert session.length.tolist() == [2, 2]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cache_is_updated_in_place(
    bundles: Callable[..., Bundle],
    precision: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort_session, "LOG_SEVERITY", 2)  # TensorScatter warns when it copies
    with open_session(bundles(precision=precision)) as session:
        assert isinstance(session, ort_session.OnnxRuntimeSession)
        keys = session.cache("k_cache.0")
        assert keys.shape == (3, J, 32, 8)
        address = keys.ctypes.data
        assert not keys.any()
        session.step(ids(*PROMPTS), np.array([7, 1, 3]))
        decode_step(session, [1, None, 2])
        assert session.cache("k_cache.0").ctypes.data == address
        assert keys[0, :, :8].all()
        assert not keys[0, :, 8:].any()
        assert keys[2, :, :4].all()
        for step in session._steps.values():
            bound = step.io.get_outputs()[1 : 1 + 2 * toy.L]
            assert [value.data_ptr() for value in bound] == [
                session.cache(binding.name).ctypes.data for binding in session.contract.caches()
            ]
        assert "TensorScatter" not in capfd.readouterr().err
        # The same step with an output buffer of its own warns: the silence above means something.
        io = session._steps[1].io
        kind = ort_session._ONNX_TYPES[keys.dtype.name]
        apart = np.empty_like(keys)
        io.bind_output("k_cache_out.0", "cpu", 0, kind, keys.shape, apart.ctypes.data)
        session._ort.run_with_iobinding(io)
        assert "TensorScatter: in-place optimization not activated" in capfd.readouterr().err


def test_a_quiet_library_prints_nothing(open_toy: OpenToy, capfd: pytest.CaptureFixture[str]) -> None:
    with open_toy() as session:
        session.step(ids(*PROMPTS), np.array([7, 1, 3]))
    assert capfd.readouterr() == ("", "")


def test_too_many_tokens_are_refused_before_anything_runs(open_toy: OpenToy) -> None:
    with open_toy(batch=2, capacity=8) as session:
        prefill(session, [[1, 2, 3, 4, 5], [1, 2]])
        before = session.cache("k_cache.0").copy()
        with pytest.raises(
            ResourceError, match=r"Row 0 holds 5 tokens and 4 more \(1 its own, .* the capacity 8: open"
        ):
            session.step(ids([1], [1, 2, 3, 4]), np.array([1, 4]))  # row 0 would write padding beyond the end
        np.testing.assert_array_equal(session.cache("k_cache.0"), before)
        assert session.length.tolist() == [5, 2]
        session.step(ids([6, 7, 8], [3, 4, 5]))
        with pytest.raises(ResourceError, match="Row 0 holds 8 tokens and 1 more"):
            decode_step(session, [None, 1])
        session.reset([0])
        np.testing.assert_allclose(decode_step(session, [9, 6])[1], oracle([1, 2, 3, 4, 5, 6])[-1], atol=1e-4)
        assert session.length.tolist() == [1, 6]


def test_idle_and_reset_rows_do_not_disturb_others(open_toy: OpenToy) -> None:
    with open_toy() as session:
        prefill(session, PROMPTS)
        for token in (5, 6, 7):
            decode_step(session, [token, None, token])
        np.testing.assert_allclose(decode_step(session, [None, 9, None])[1], oracle([60, 9])[-1], atol=1e-4)
        session.reset([0])
        logits = session.step(ids([8, 9], [], [1]), np.array([2, 0, 1])).logits
        np.testing.assert_allclose(logits[0], oracle([8, 9])[-1], atol=1e-4)
        np.testing.assert_allclose(logits[2], oracle([3, 1, 4, 5, 6, 7, 1])[-1], atol=1e-4)
        assert session.length.tolist() == [2, 2, 7]


def test_bindings_are_kept_for_decoding_and_one_other_size(open_toy: OpenToy) -> None:
    with open_toy() as session:
        assert isinstance(session, ort_session.OnnxRuntimeSession)
        decode_step(session, [1])
        kept = session._steps[1]
        for size in (4, 2, 3):
            session.step(np.zeros((3, size), np.int64))
        decode_step(session, [1])
        assert set(session._steps) == {1, 3}
        assert session._steps[1] is kept


def test_reset_forgets(open_toy: OpenToy) -> None:
    with open_toy(batch=1) as session:
        first = prefill(session, [[1, 2, 3]])
        session.reset()
        np.testing.assert_array_equal(prefill(session, [[1, 2, 3]]), first)
        with pytest.raises(UsageError, match=r"no row 1: the session has rows 0\.\.0"):
            session.reset([1])


@pytest.mark.parametrize(
    ("tokens", "counts", "error", "message"),
    [
        (np.zeros((2, 1), np.int64), None, UsageError, r"shape \[2, 1\], expected \[3,S\]"),
        (np.zeros((3, 0), np.int64), None, UsageError, "at least 1"),
        (np.zeros(3, np.int64), None, UsageError, r"shape \[3\]"),
        (np.zeros((3, 1), np.int32), None, UsageError, "int32, expected int64"),
        (np.array([[1, 2], [0, V], [0, 0]]), None, InputError, r"token id 61 \(row 1, new token 1\).*0\.\.60"),
        (np.array([[1], [0], [-1]]), None, InputError, "token id -1"),
        (np.zeros((3, 1), np.int64), np.array([1, 1]), UsageError, r"counts must be \[3\]"),
        (np.zeros((3, 1), np.int64), np.array([1.0, 1, 1]), UsageError, "integers"),
        (np.zeros((3, 1), np.int64), np.array([1, 2, 0]), UsageError, r"each must be 0\.\.1"),
        (np.zeros((3, 1), np.int64), np.array([1, -1, 0]), UsageError, r"each must be 0\.\.1"),
    ],
)
def test_wrong_arguments(open_toy: OpenToy, tokens: Any, counts: Any, error: type[Exception], message: str) -> None:
    with open_toy() as session:
        with pytest.raises(error, match=message):
            session.step(tokens, counts)
        assert session.length.tolist() == [0, 0, 0]


def test_length_can_not_be_written_from_outside(open_toy: OpenToy) -> None:
    with open_toy() as session, pytest.raises(ValueError, match="read-only"):
        session.length[0] = 5


def test_closed_session(open_toy: OpenToy) -> None:
    session = open_toy()
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.step(np.zeros((3, 1), np.int64))


@pytest.mark.parametrize("logits", ["last", "all"])
def test_nonfinite_logits_are_refused_and_do_not_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits: str
) -> None:
    poisoned = toy.weights()
    poisoned["embed"][13] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(toy, "weights", lambda seed: poisoned)
        bundle = Bundle.open(write_bundle(tmp_path / "toy", logits=logits))
    with open_session(bundle) as session:
        prefill(session, PROMPTS)
        with pytest.raises(AccuracyError, match=r"not finite \(row 1, after 1 tokens\)"):
            decode_step(session, [4, 13, 5])
        assert session.length.tolist() == [7, 1, 3]
        assert np.isfinite(session.cache("v_cache.1")).all()
        decoded = decode_step(session, [8, 2, None])  # what the failed step wrote is gone
        np.testing.assert_allclose(decoded[0], oracle([*PROMPTS[0], 8])[-1], atol=1e-4)
        np.testing.assert_allclose(decoded[1], oracle([60, 2])[-1], atol=1e-4)

    with open_session(bundle) as session:  # what an idle row computes does not matter
        prefill(session, PROMPTS)
        session.step(np.array([[4, 5, 5], [13, 13, 13], [5, 5, 5]]), np.array([1, 0, 3]))
        decoded = decode_step(session, [8, 2, None])
        np.testing.assert_allclose(decoded[0], oracle([*PROMPTS[0], 4, 8])[-1], atol=1e-4)
        np.testing.assert_allclose(decoded[1], oracle([60, 2])[-1], atol=1e-4)


def test_failed_step_changes_no_length(open_toy: OpenToy, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_toy() as session:
        prefill(session, PROMPTS)
        decode_step(session, [None, None, None])

        def fail(message: str) -> Any:
            def run_with_iobinding(_: Any) -> None:
                session.cache("k_cache.0")[:] = np.nan
                raise RuntimeError(message)

            return type("Failing", (), {"run_with_iobinding": staticmethod(run_with_iobinding)})()

        monkeypatch.setattr(session, "_ort", fail("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            decode_step(session, [1, 1, 1])
        assert session.length.tolist() == [7, 1, 3]
        assert not session.cache("k_cache.0")[1, :, 1:].any()
        monkeypatch.setattr(session, "_ort", fail("Failed to allocate memory for requested buffer of size 9"))
        with pytest.raises(ResourceError, match="smaller prefill chunk"):
            decode_step(session, [1, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, UsageError, "batch is 0"),
        ({"capacity": 0}, UsageError, "capacity is 0"),
        ({"capacity": 65}, UsageError, r"must be 1\.\.64, the number of positions"),
        ({"threads": 0}, UsageError, "threads is 0"),
        ({"device": "tpu"}, UsageError, "no device 'tpu': choose one of cpu, cuda"),
        ({"target": "onnxruntme"}, UsageError, "did you mean 'onnxruntime'"),
        ({"target": "xyz"}, UsageError, "choose one of onnxruntime"),
        ({"batch": 1 << 40}, UsageError, r"must be 1\.\.65536"),
    ],
)
def test_wrong_openings(
    bundles: Callable[..., Bundle], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_session(bundles(), **arguments)


def test_caches_larger_than_the_memory(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "toy", max_position_embeddings=1 << 40))
    with pytest.raises(ResourceError, match=r"3 rows of 1099511627776 tokens need 786432\.0 GiB, more than there is"):
        open_session(bundle, capacity=1 << 40)


def test_sizes_default_to_the_bundle(open_toy: OpenToy) -> None:
    with open_toy() as session:
        assert (session.batch, session.capacity) == (3, 32)


def test_missing_library_names_the_extra(bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r'pip install "glm-export\[cpu\]"'):
        open_session(bundles())


def test_device_that_the_library_lacks(bundles: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"no cuda support: .*glm-export\[cuda\]"):
        open_session(bundles(), device="cuda")


def test_graph_that_is_not_the_manifests(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "toy")
    for contract, precision in (
        (contract_of("bf16"), "bf16"),
        (contract_of(outputs=("hidden_states",)), "fp32"),
        (dataclasses.replace(contract_of(), num_hidden_layers=1), "fp32"),
    ):
        record(directory, contract, precision)
        with pytest.raises(IntegrityError, match=r"of model\.onnx are not those of the manifest's contract"):
            open_session(Bundle.open(directory))


def test_graph_that_does_not_load(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "toy")
    path = directory / "model.onnx"
    good = path.read_bytes()
    for data, error, message in (
        (b"not onnx", IntegrityError, "can not load"),
        (unknown_op(good), (IntegrityError, BackendError), r"model\.onnx"),
    ):
        path.write_bytes(data)
        record(directory, contract_of(), "fp32")
        with pytest.raises(error, match=message) as raised:
            open_session(Bundle.open(directory))
        assert "\n" not in str(raised.value)


def unknown_op(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    model.graph.node[-1].domain = "nowhere"
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    return bytes(model.SerializeToString())


def test_runtime_imports_neither_torch_nor_click() -> None:
    code = (
        "import importlib, pkgutil, sys, glm_export.runtime as package\n"
        "names = [module.name for module in pkgutil.walk_packages(package.__path__, 'glm_export.runtime.')]\n"
        "assert len(names) >= 8, names\n"
        "for name in names: importlib.import_module(name)\n"
        "print({'torch', 'click', 'onnx', 'onnxruntime', 'tokenizers'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
