import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import toy
from toy import J, ToyBundle, contract_of, record, write_bundle

from glm_export.runtime import ort_session
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import BackendError, IntegrityError, ResourceError
from glm_export.runtime.generate import decode_step, prefill
from glm_export.runtime.open import open_session

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [60], [3, 1, 4]]


def ids(*rows: list[int]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int64)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cache_is_updated_in_place(
    toy_bundle: ToyBundle,
    precision: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort_session, "LOG_SEVERITY", 2)  # TensorScatter warns when it copies
    with open_session(toy_bundle(precision=precision)) as session:
        assert isinstance(session, ort_session.OnnxRuntimeSession)
        keys = session.cache("k_cache.0")
        assert keys.shape == (3, J, 32, 8)
        assert keys.base is session.cache("v_cache.1").base  # one allocation, which is in large pages where it is large
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


def mappings(directory: Path) -> int:
    """How many mappings this process has of files below a directory."""
    return Path("/proc/self/maps").read_text().count(f" {directory}/")


def test_a_weight_file_is_mapped_once_until_the_session_is_closed(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "toy")
    with open_session(Bundle.open(directory), batch=1, threads=1) as session:
        assert isinstance(session, ort_session.OnnxRuntimeSession)
        if session.kernels is None:
            pytest.skip("without kernels ONNX Runtime maps each tensor by itself")
        decode_step(session, [1])
        assert mappings(directory) == 1
    assert mappings(directory) == 0


def test_the_engine_takes_part_of_a_step(toy_bundle: ToyBundle) -> None:
    with open_session(toy_bundle()) as session:
        assert session.engine_seconds is None
        for new in (7, 1):
            started = time.perf_counter()
            session.step(np.ones((session.batch, new), np.int64))
            took = time.perf_counter() - started
            assert session.engine_seconds is not None
            assert 0 < session.engine_seconds < took


def test_bindings_are_kept_for_decoding_and_one_other_size(toy_bundle: ToyBundle) -> None:
    with open_session(toy_bundle(), threads=1) as session:
        assert isinstance(session, ort_session.OnnxRuntimeSession)
        decode_step(session, [1])
        kept = session._steps[1]
        for size in (4, 2, 3):
            session.step(np.zeros((3, size), np.int64))
        decode_step(session, [1])
        assert set(session._steps) == {1, 3}
        assert session._steps[1] is kept


def test_failed_step_changes_no_length(toy_bundle: ToyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(toy_bundle(), threads=1) as session:
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


def test_caches_larger_than_the_memory(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "toy", max_position_embeddings=1 << 40))
    with pytest.raises(ResourceError, match=r"3 rows of 1099511627776 tokens need 786432\.0 GiB, more than there is"):
        open_session(bundle, capacity=1 << 40)


def test_missing_library_names_the_extra(toy_bundle: ToyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r'pip install "glm-export\[cpu\]"'):
        open_session(toy_bundle())


def test_device_that_the_library_lacks(toy_bundle: ToyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"no cuda support: .*glm-export\[cuda\]"):
        open_session(toy_bundle(), device="cuda")


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
