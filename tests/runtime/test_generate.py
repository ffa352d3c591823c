import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import OpenToy, ToyBundle, V, greedy, oracle, write_bundle

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import InputError, ResourceError, UsageError
from glm_export.runtime.generate import Generation, decode_step, generate, prefill
from glm_export.runtime.open import open_session
from glm_export.runtime.session import Session

PROMPTS = [[5, 3, 8, 1, 9, 2, 7], [60], [4, 4, 4, 4], [12, 50], [33, 20, 10]]


@pytest.fixture(params=["last", "all"])
def open_one(request: pytest.FixtureRequest, open_toy: OpenToy) -> OpenToy:
    return functools.partial(open_toy, logits=request.param)


@pytest.fixture
def session(open_one: OpenToy) -> Iterator[Session]:
    with open_one() as opened:
        yield opened


@pytest.fixture
def bundle(toy_bundle: ToyBundle) -> Bundle:
    return toy_bundle()


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_greedy_equals_the_oracle_in_waves_of_ragged_rows(session: Session, chunk: int) -> None:
    assert len(PROMPTS) > session.batch
    results = generate(session, PROMPTS, max_new_tokens=12, stop_ids=(), prefill_chunk=chunk)
    assert results == [Generation(tokens=tuple(greedy(prompt, 12)), finish="length") for prompt in PROMPTS]


def test_solo_equals_batched(open_one: OpenToy) -> None:
    with open_one() as batched, open_one(batch=1) as solo:
        together = generate(batched, PROMPTS, max_new_tokens=20, stop_ids=())
        assert together == [generate(solo, [prompt], max_new_tokens=20, stop_ids=())[0] for prompt in PROMPTS]


def test_stop_tokens_end_a_row_and_are_left_out(session: Session) -> None:
    free = [greedy(prompt, 12) for prompt in PROMPTS]
    stop = free[0][3]
    assert stop not in free[0][:3]
    results = generate(session, PROMPTS, max_new_tokens=12, stop_ids={stop})
    assert results[0] == Generation(tokens=tuple(free[0][:3]), finish="stop")
    for tokens, result in zip(free, results, strict=True):
        expected = tokens[: tokens.index(stop)] if stop in tokens else tokens
        assert result.tokens == tuple(expected)
        assert result.finish == ("stop" if stop in tokens else "length")


def test_the_bundles_stop_tokens_are_the_default(session: Session) -> None:
    for prompt in ([first, second] for first in range(V) for second in (0, 9)):
        tokens = greedy(prompt, 6)
        if 7 in tokens:
            [result] = generate(session, [prompt], max_new_tokens=6)
            assert result == Generation(tokens=tuple(tokens[: tokens.index(7)]), finish="stop")
            return
    pytest.fail("no prompt of the toy generates the stop token: change its seed")


def test_streaming(session: Session) -> None:
    stop = greedy(PROMPTS[0], 4)[3]
    seen: list[list[int]] = [[] for _ in PROMPTS]
    logits: list[list[np.ndarray]] = [[] for _ in PROMPTS]
    results = generate(
        session,
        PROMPTS,
        max_new_tokens=5,
        stop_ids={stop},
        on_token=lambda row, token: seen[row].append(token),
        on_logits=lambda row, logits_V: logits[row].append(logits_V.copy()),
    )
    assert [tuple(tokens) for tokens in seen] == [result.tokens for result in results]
    for prompt, result, rows in zip(PROMPTS, results, logits, strict=True):
        assert len(rows) == len(result.tokens) + (result.finish == "stop")
        for i, row in enumerate(rows):
            np.testing.assert_allclose(row, oracle([*prompt, *result.tokens[:i]])[-1], atol=1e-4)


class FlatSession(Session):
    """An engine that finds all tokens equally likely."""

    def _execute(self, tokens: Any, write_index_B: Any, length_B: Any) -> Any:
        from glm_export.runtime.session import StepOutput

        return StepOutput(logits=np.zeros((self.batch, V), np.float32))

    def _clear(self, length_B: Any) -> None: ...

    def _close(self) -> None: ...

    def cache(self, name: str) -> Any: ...


def test_lowest_id_wins_a_tie(bundle: Bundle) -> None:
    [result] = generate(FlatSession(bundle), [[1]], max_new_tokens=3, stop_ids=())
    assert result.tokens == (0, 0, 0)


def test_a_prompt_and_its_new_tokens_may_fill_the_capacity(open_one: OpenToy) -> None:
    with open_one(batch=2, capacity=10) as session:
        prompts = [[1, 2, 3, 4, 5, 6, 7], [9]]
        results = generate(session, prompts, max_new_tokens=3, stop_ids=(), prefill_chunk=4)
        assert [result.tokens for result in results] == [tuple(greedy(prompt, 3)) for prompt in prompts]


@pytest.mark.parametrize(
    ("prompts", "choices", "error", "message"),
    [
        ([[1], []], {}, InputError, "Prompt 1 is empty"),
        ([[1, V]], {}, InputError, r"Prompt 0 has the token id 61.*0\.\.60"),
        ([[1]], {"max_new_tokens": 0}, UsageError, "max_new_tokens is 0"),
        ([[1]], {"prefill_chunk": 0}, UsageError, "prefill_chunk 0"),
        ([[1], [1] * 30], {}, ResourceError, r"Prompt 1 has 30 tokens and 4 new .* capacity is 32: .* capacity of 34"),
        ([[1] * 61], {}, InputError, "the model has 64 positions"),
    ],
)
def test_refusals_come_before_any_step(
    session: Session, prompts: Any, choices: dict[str, Any], error: type[Exception], message: str
) -> None:
    decode_step(session, [1, 2, 3])
    with pytest.raises(error, match=message):
        generate(session, prompts, **{"max_new_tokens": 4, **choices})
    assert session.length.tolist() == [1, 1, 1]


def test_no_prompts(session: Session) -> None:
    assert generate(session, [], max_new_tokens=1) == []


def test_embeddings_are_not_generated_from(tmp_path: Path) -> None:
    directory = write_bundle(tmp_path / "toy", inputs_embeds=True)
    with open_session(Bundle.open(directory)) as session, pytest.raises(UsageError, match="takes embeddings"):
        generate(session, [[1]], max_new_tokens=1)


def test_teacher_forcing_and_a_second_turn(session: Session) -> None:
    """Prefill continues from what the rows hold: the pieces validation and chat are made of."""
    logits = prefill(session, [[1, 2, 3], [4]], 2)
    assert not logits[2].any()
    decode_step(session, [10, 11])
    logits = prefill(session, [[20, 21], [22, 23, 24]], 2)
    np.testing.assert_allclose(logits[0], oracle([1, 2, 3, 10, 20, 21])[-1], atol=1e-4)
    np.testing.assert_allclose(logits[1], oracle([4, 11, 22, 23, 24])[-1], atol=1e-4)
    assert session.length.tolist() == [6, 5, 0]


def test_more_prompts_or_tokens_than_rows(session: Session) -> None:
    with pytest.raises(UsageError, match=r"5 prompts .* at most 3"):
        prefill(session, PROMPTS)
    with pytest.raises(UsageError, match="4 tokens for 3 rows"):
        decode_step(session, [1, 2, 3, 4])
