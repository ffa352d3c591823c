"""Greedy decoding: prefill the prompts in chunks, then one token per step until a stop token or the limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glm_export.runtime.errors import InputError, ResourceError, UsageError
from glm_export.runtime.session import Floats, Session, StepOutput

PREFILL_CHUNK = 512

OnToken = Callable[[int, int], None]
"""Is told (prompt index, token id) of each generated token, when it is known."""
OnLogits = Callable[[int, Floats], None]
"""Is told (prompt index, [V] logits) of each choice, that of a stop token included; copy them to keep them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What was generated after one prompt."""

    tokens: tuple[int, ...]
    """Without the stop token."""
    finish: Literal["stop", "length"]


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | None = None,
    on_token: OnToken | None = None,
    on_logits: OnLogits | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> list[Generation]:
    """Continues every prompt greedily; of equal logits the lowest id wins.

    Prompts beyond the session's batch are served in waves. The session is reset before each.

    Args:
        session: an open session; its tokens are forgotten.
        prompts: token ids.
        max_new_tokens: the limit per prompt.
        stop_ids: end a generation; the bundle's eos_token_ids when None.
        on_token: see OnToken.
        on_logits: see OnLogits.
        prefill_chunk: most prompt tokens per step; fewer where the engine takes fewer.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, or more tokens than the model has positions.
        ResourceError: a prompt and its new tokens exceed the capacity. Both are raised before any step.
        UsageError: max_new_tokens or prefill_chunk below 1, or a bundle that takes embeddings.
    """
    _check(session, prompts, max_new_tokens, prefill_chunk)
    stops = frozenset(session.bundle.manifest.eos_token_ids if stop_ids is None else stop_ids)
    done: list[Generation] = []
    for first in range(0, len(prompts), session.batch):
        wave = prompts[first : first + session.batch]
        tokens: list[list[int]] = [[] for _ in wave]
        finish: list[Literal["stop", "length"] | None] = [None for _ in wave]
        session.reset()
        logits_BV = prefill(session, wave, prefill_chunk)
        while True:
            for row in (row for row in range(len(wave)) if finish[row] is None):
                token = int(logits_BV[row].argmax())  # the first of equal ones
                if on_logits:
                    on_logits(first + row, logits_BV[row])
                if token in stops:
                    finish[row] = "stop"
                    continue
                tokens[row].append(token)
                if on_token:
                    on_token(first + row, token)
                if len(tokens[row]) == max_new_tokens:
                    finish[row] = "length"
            if all(finish):
                break
            logits_BV = decode_step(session, [None if finish[row] else tokens[row][-1] for row in range(len(wave))])
        done += [Generation(tokens=tuple(ids), finish=end or "length") for ids, end in zip(tokens, finish, strict=True)]
    return done


def prefill(session: Session, prompts: Sequence[Sequence[int]], chunk: int = PREFILL_CHUNK) -> Floats:
    """Feeds one prompt to each of the first rows, `chunk` tokens at a time or what the engine takes; others idle.

    Returns the logits [B,V] after each prompt's last token (zeros for rows without a prompt), float32, a copy.
    Rows continue from what they hold, so reset the session before a new conversation.

    Raises:
        UsageError: more prompts than rows, or a chunk below 1.
    """
    if len(prompts) > session.batch or chunk < 1:
        raise UsageError(
            f"{len(prompts)} prompts in chunks of {chunk}: expected at most {session.batch} prompts and chunks of 1 "
            "or more."
        )
    chunk = min(chunk, session.max_step_tokens or chunk)
    sizes = np.zeros(session.batch, np.int64)
    sizes[: len(prompts)] = [len(prompt) for prompt in prompts]
    logits_BV = np.zeros((session.batch, session.contract.vocab_size), np.float32)
    longest = int(sizes.max())
    for start in range(0, longest, chunk):
        # Not wider than the longest rest: padding takes capacity too.
        tokens_BS = np.zeros((session.batch, min(chunk, longest - start)), np.int64)
        counts_B = np.clip(sizes - start, 0, tokens_BS.shape[1])
        for row, prompt in enumerate(prompts):
            tokens_BS[row, : counts_B[row]] = prompt[start : start + counts_B[row]]
        latest_BV = last_logits(session.step(tokens_BS, counts_B), counts_B)
        fed = counts_B > 0
        logits_BV[fed] = latest_BV[fed]
    return logits_BV


def decode_step(session: Session, tokens: Sequence[int | None]) -> Floats:
    """Feeds one token to each of the first rows; None and further rows idle.

    Returns the logits [B,V] of the rows that took a token, unspecified for the others; valid until the next step.

    Raises:
        UsageError: more tokens than rows.
    """
    if len(tokens) > session.batch:
        raise UsageError(f"{len(tokens)} tokens for {session.batch} rows: expected at most one per row.")
    counts_B = None
    if len(tokens) < session.batch or None in tokens:
        counts_B = np.zeros(session.batch, np.int64)
        counts_B[: len(tokens)] = [token is not None for token in tokens]
    logits = session.step(session.next_tokens(tokens), counts_B).logits
    return logits if session.contract.logits == "last" else logits[:, 0]


def last_logits(output: StepOutput, counts_B: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Floats:
    """The logits [B,V] of each row's last valid token, whichever logits the engine returns."""
    if output.logits.ndim == 2:
        return output.logits
    return output.logits[np.arange(len(counts_B)), np.maximum(counts_B - 1, 0)]


def _check(session: Session, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int) -> None:
    if session.contract.inputs_embeds:
        raise UsageError("This bundle takes embeddings, not token ids: call the session's step with them.")
    if max_new_tokens < 1 or chunk < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens} and prefill_chunk {chunk}: both must be 1 or more.")
    positions = session.bundle.manifest.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"Prompt {index} is empty: give at least one token.")
        if wrong := [token for token in prompt if not 0 <= token < session.contract.vocab_size]:
            raise InputError(
                f"Prompt {index} has the token id {wrong[0]}, which is not in the vocabulary: "
                f"use ids 0..{session.contract.vocab_size - 1}."
            )
        total = len(prompt) + max_new_tokens
        request = f"Prompt {index} has {len(prompt)} tokens and {max_new_tokens} new ones are asked for"
        if total > positions:
            raise InputError(f"{request}, but the model has {positions} positions: shorten the prompt or ask for less.")
        if total > session.capacity:
            raise ResourceError(
                f"{request}, but the session's capacity is {session.capacity}: open it with a capacity of {total} "
                "or more, or ask for less."
            )
