"""The session: one interface to every target, and the checks that no target makes.

A session owns B rows of KV cache. `step` feeds each row its next tokens (right-padded to the longest) and returns
logits; the session counts how many tokens each row holds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import AccuracyError, InputError, ResourceError, UsageError

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

MAX_BATCH = 65536
"""Far more rows than any cache has room for: a larger number is a mistake."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What one step computed. `logits` is the session's own buffer: copy it to keep it beyond the next step."""

    logits: Floats
    """[B,V], of each row's last valid token, or [B,S,V]; unspecified for rows and positions without a new token."""
    extras: Mapping[str, Array] = field(default_factory=dict)
    """The optional outputs of the contract, by name; copies that stay valid."""


class Session(ABC):
    """An engine opened for decoding. `with` closes it.

    Subclasses implement `_execute`, `_clear` and `_close`.
    """

    max_step_tokens: int | None = None
    """Most new tokens per row that one step takes; None if there is no such bound."""

    engine_seconds: float | None = None
    """What the engine itself took of the last step; None if the target does not say."""

    def __init__(self, bundle: Bundle, *, batch: int | None = None, capacity: int | None = None) -> None:
        """Checks the sizes; None means the bundle's default.

        Raises:
            InputError: the bundle has no weights.
            UsageError: batch is not 1..MAX_BATCH, or capacity not 1..the model's number of positions.
        """
        manifest = bundle.manifest
        bundle.require_weights()
        self.bundle = bundle
        self.contract = manifest.contract
        self.batch = manifest.batch if batch is None else batch
        self.capacity = manifest.capacity if capacity is None else capacity
        if not 1 <= self.batch <= MAX_BATCH:
            raise UsageError(f"batch is {self.batch}: it must be 1..{MAX_BATCH}.")
        if not 1 <= self.capacity <= manifest.max_position_embeddings:
            raise UsageError(
                f"capacity is {self.capacity}: it must be 1..{manifest.max_position_embeddings}, "
                "the number of positions of the model."
            )
        self.closed = False
        self._length, self._length_view = _viewed(self.batch)  # during a step already as after it
        self._before, self._before_view = _viewed(self.batch)
        next_B, self._next_view = _viewed(self.batch)
        self._next = next_B[:, None]

    @property
    def length(self) -> Ints:
        """Valid tokens per row, [B] int64 (a read-only view)."""
        view = self._length.view()
        view.flags.writeable = False
        return view

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forgets the tokens of the given rows, or of all.

        Raises:
            UsageError: there is no such row.
        """
        chosen = range(self.batch) if rows is None else rows
        for row in chosen:
            if not 0 <= row < self.batch:
                raise UsageError(f"There is no row {row}: the session has rows 0..{self.batch - 1}.")
        self._length[list(chosen)] = 0

    def next_tokens(self, tokens: Sequence[int | None]) -> Ints:
        """One token per row as `step` takes them, [B,1]; 0 where there is none.

        It is an array of the session, the same at every call: with that one a step neither allocates nor copies.
        """
        view = self._next_view
        for row in range(self.batch):
            view[row] = (tokens[row] if row < len(tokens) else None) or 0
        return self._next

    def step(self, tokens: Array, counts: Array | None = None) -> StepOutput:
        """Appends tokens to every row and computes their logits.

        A row may take fewer than S tokens, or none (it idles); its padding must be valid ids and is not remembered.
        An error leaves `length` as it was.

        Args:
            tokens: [B,S] int64 ids, right-padded; [B,S,D] floats for a contract with inputs_embeds.
            counts: [B] integers, how many of the S tokens each row takes; all of them when None.

        Raises:
            UsageError: wrong shape or dtype, S above `max_step_tokens`, a count outside 0..S, or the session is closed.
            InputError: a token id outside the vocabulary, or an embedding that is not finite.
            ResourceError: a row would outgrow the capacity; nothing was executed.
            AccuracyError: the engine computed logits that are not finite; nobody should sample from it.
        """
        if self.closed:
            raise UsageError("The session is closed: open another one.")
        tokens = self._checked_tokens(tokens)
        new = 1 if tokens is self._next else tokens.shape[1]
        if self.max_step_tokens is not None and new > self.max_step_tokens:
            raise UsageError(
                f"A step of this engine takes at most {self.max_step_tokens} new tokens per row, not "
                f"{new}: feed them in several steps, as `prefill` does."
            )
        taken = [new] * self.batch if counts is None else self._checked_counts(counts, new)
        self._check_capacity(new, taken)
        before, length = self._before_view, self._length_view
        for row, count in enumerate(taken):
            before[row] = held = length[row]
            length[row] = held + count
        try:
            output = self._execute(tokens, self._before, self._length)
            if not self._all_finite(output.logits):
                self._refuse_valid_nonfinite(output.logits, taken)
                self._clear(self._length)
        except BaseException:  # an interrupt too
            self._length[:] = self._before
            # What was written there may be NaN, and a masked NaN still poisons attention.
            self._clear(self._length)
            raise
        return output

    def close(self) -> None:
        """Frees the engine and the caches; closing twice is fine."""
        if not self.closed:
            self.closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def _execute(self, tokens: Array, write_index_B: Ints, length_B: Ints) -> StepOutput:
        """Runs the engine on checked inputs: tokens [B,S] or [B,S,D] in the contract's dtype.

        `write_index_B` and `length_B` are the same two arrays at every call, so they can be bound once.
        """

    @abstractmethod
    def _clear(self, length_B: Ints) -> None:
        """Zeroes every row's caches from its length on."""

    @abstractmethod
    def _close(self) -> None:
        """Frees everything."""

    def _all_finite(self, logits: Floats) -> bool:
        """Whether the logits of the step that was just executed are."""
        return all_finite(logits)

    @abstractmethod
    def cache(self, name: str) -> Array:
        """The KV cache `k_cache.{i}` or `v_cache.{i}`, [B,J,C,A]: a view where it lies in host memory, else a copy."""

    def _checked_tokens(self, tokens: Array) -> Array:
        if self.contract.inputs_embeds:
            return self._checked_embeddings(tokens)
        if tokens is self._next:
            low, high = min(self._next_view), max(self._next_view)
        else:
            self._check_shape(tokens)
            if tokens.dtype != np.int64:
                raise UsageError(f"The new tokens are {tokens.dtype}, expected int64: convert them.")
            low, high = tokens.min(), tokens.max()
        if low < 0 or high >= self.contract.vocab_size:
            row, position = np.argwhere((tokens < 0) | (tokens >= self.contract.vocab_size))[0].tolist()
            raise InputError(
                f"The token id {tokens[row, position]} (row {row}, new token {position}) is not in the vocabulary: "
                f"use ids 0..{self.contract.vocab_size - 1}."
            )
        return tokens

    def _checked_embeddings(self, tokens: Array) -> Array:
        self._check_shape(tokens, self.contract.hidden_size)
        compute = numpy_dtype(self.contract.compute_dtype)
        if tokens.dtype not in (compute, np.float32):
            raise UsageError(f"The embeddings are {tokens.dtype}, expected float32 or {compute}: convert them.")
        tokens = tokens.astype(compute, copy=False)
        if not np.isfinite(tokens).all():
            raise InputError("An embedding is not a finite number in the engine's dtype: check where it came from.")
        return tokens

    def _check_shape(self, tokens: Array, *wanted: int) -> None:
        shape = tokens.shape
        if len(shape) != 2 + len(wanted) or shape[0] != self.batch or shape[1] < 1 or shape[2:] != wanted:
            expected = ",".join(map(str, (self.batch, "S", *wanted)))
            raise UsageError(f"The new tokens have shape {list(shape)}, expected [{expected}] with S of at least 1.")

    def _checked_counts(self, counts: Array, new: int) -> list[int]:
        if counts.shape != (self.batch,) or counts.dtype.kind not in "iu":
            raise UsageError(f"counts must be [{self.batch}] integers, one per row.")
        taken: list[int] = counts.tolist()
        if min(taken) < 0 or max(taken) > new:
            raise UsageError(f"counts are {taken}: each must be 0..{new}, the number of new tokens.")
        return taken

    def _check_capacity(self, new: int, taken: list[int]) -> None:
        # Padding is written too, and targets drop a write beyond the capacity without a word.
        held = max(self._length_view)
        if held + new > self.capacity:
            row = int(self._length.argmax())
            raise ResourceError(
                f"Row {row} holds {held} tokens and {new} more ({taken[row]} its own, the rest padding) "
                f"do not fit the capacity {self.capacity}: open the session with a larger capacity, or reset the row."
            )

    def _refuse_valid_nonfinite(self, logits: Floats, taken: list[int]) -> None:
        for row in range(self.batch):
            own = logits[row, : taken[row]] if logits.ndim == 3 else logits[row]
            if taken[row] and not all_finite(own):
                raise AccuracyError(
                    f"The engine computed logits that are not finite (row {row}, after {self._before[row]} tokens): "
                    "run `glm-export verify` and `glm-export validate` on the bundle."
                )


# After an engine has streamed gigabytes of weights, nothing of Python or NumPy is left in the CPU's caches, and a step
# pays for every piece of code and memory that it touches for the first time; NumPy's for small arrays is the dearest.
# So there are lists for what is a few numbers, a memory view to fill an array, and of NumPy what touches least.
def _viewed(batch: int) -> tuple[Ints, memoryview]:
    """Zeros [B] and a view to fill them."""
    array = np.zeros(batch, np.int64)
    return array, memoryview(array)  # type: ignore[arg-type]


def all_finite(x: Array) -> bool:
    """Whether there is neither NaN nor infinity in `x`: to NumPy a NaN is both the smallest and the largest number."""
    spread: float = x.item(x.argmax()) - x.item(x.argmin())
    return spread < math.inf  # as Python's numbers: no float32 is too large for them


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name in a contract or an engine, such as float32, bfloat16 or float8_e4m3fn."""
    return np.dtype(getattr(ml_dtypes, name, name))
