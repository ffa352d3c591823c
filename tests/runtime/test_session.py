import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import toy
from toy import OpenToy, ToyBundle, V, oracle, write_bundle

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import (
    AccuracyError,
    InputError,
    ResourceError,
    UsageError,
)
from glm_export.runtime.generate import decode_step, prefill
from glm_export.runtime.open import open_session
from glm_export.runtime.session import all_finite

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-4, "bf16": 1e-4}  # the oracle rounds its cache to the same dtype
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [60], [3, 1, 4]]


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


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(bad: float) -> None:
    largest = float(np.finfo(np.float32).max)
    for size in (1, 2, 7, 8, 9, 31, 64, 100):
        logits = np.resize(np.array([1.0, -largest, 0.0, largest, -1e-45], np.float32), (2, size))
        assert all_finite(logits)
        for position in range(2 * size):
            changed = logits.copy()
            changed.flat[position] = bad
            assert not all_finite(changed)
            changed.flat[-1 - position] = math.inf  # nor does one hide another
            assert not all_finite(changed)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, add_engine: Any, logits: str
) -> None:
    poisoned = toy.weights()
    poisoned["embed"][13] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(toy, "weights", lambda seed: poisoned)
        directory = write_bundle(tmp_path / "toy", logits=logits)
        add_engine(directory, target)
        bundle = Bundle.open(directory)
    with open_session(bundle, target=target) as session:
        prefill(session, PROMPTS)
        with pytest.raises(AccuracyError, match=r"not finite \(row 1, after 1 tokens\)"):
            decode_step(session, [4, 13, 5])
        assert session.length.tolist() == [7, 1, 3]
        assert np.isfinite(session.cache("v_cache.1")).all()
        decoded = decode_step(session, [8, 2, None])  # what the failed step wrote is gone
        np.testing.assert_allclose(decoded[0], oracle([*PROMPTS[0], 8])[-1], atol=1e-4)
        np.testing.assert_allclose(decoded[1], oracle([60, 2])[-1], atol=1e-4)

    with open_session(bundle, target=target) as session:  # what an idle row computes does not matter
        prefill(session, PROMPTS)
        session.step(np.array([[4, 5, 5], [13, 13, 13], [5, 5, 5]]), np.array([1, 0, 3]))
        decoded = decode_step(session, [8, 2, None])
        np.testing.assert_allclose(decoded[0], oracle([*PROMPTS[0], 4, 8])[-1], atol=1e-4)
        np.testing.assert_allclose(decoded[1], oracle([60, 2])[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, UsageError, "batch is 0"),
        ({"capacity": 0}, UsageError, "capacity is 0"),
        ({"capacity": 65}, UsageError, r"must be 1\.\.64, the number of positions"),
        ({"threads": 0}, UsageError, "threads is 0"),
        ({"device": "tpu"}, UsageError, "no device 'tpu': choose one of cpu, cuda"),
        ({"cache_dtype": "int8"}, UsageError, "no cache dtype 'int8': choose one of float32, bfloat16"),
        ({"target": "onnxruntme"}, UsageError, "did you mean 'onnxruntime'"),
        ({"target": "xyz"}, UsageError, "choose one of onnxruntime"),
        ({"batch": 1 << 40}, UsageError, r"must be 1\.\.65536"),
    ],
)
def test_wrong_openings(toy_bundle: ToyBundle, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_session(toy_bundle(), **arguments)


def test_sizes_default_to_the_bundle(open_toy: OpenToy) -> None:
    with open_toy() as session:
        assert (session.batch, session.capacity) == (3, 32)


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
