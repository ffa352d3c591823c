"""What is measured of every peer that runs in Python, so that all of them do the same.

Batch 1, the same fixed random tokens for everybody: a random model that is fed its own choices soon repeats one token,
and with it one set of experts. Decode is `steps` tokens after a context, one at a time; prefill is one prompt, of which
the logits of the last token are taken. One warm-up, then repeats. Each peer has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

PROMPT = 512
"""Tokens of a prefill."""


class Model(Protocol):
    """A model that is open for decoding."""

    vocab_size: int

    def reset(self) -> None:
        """Forgets all tokens."""

    def feed(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Appends tokens; returns the logits [V] after the last one, valid until the next call."""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every peer takes; `model` is what it opens."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, default in (("threads", 2), ("context", 128), ("steps", 64), ("prompt", PROMPT), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def measure(open_model: Callable[[], Model], options: argparse.Namespace) -> None:
    """Prints one JSON line: rates in tokens/s, seconds to the first token, and the greedy choice at every step.

    `first_token` is the time from opening to the logits after the context; imports are not part of it.
    """
    start = time.perf_counter()
    model = open_model()
    opened = time.perf_counter()
    tokens: list[int] = np.random.default_rng(1).integers(2, model.vocab_size, 4096).tolist()
    context, following = tokens[: options.context], tokens[options.context : options.context + options.steps]
    model.feed(context)
    first_token = time.perf_counter() - start

    decode: list[float] = []
    prefill: list[float] = []
    for _ in range(options.repeats + 1):
        model.reset()
        greedy = [int(model.feed(context).argmax())]
        begin = time.perf_counter()
        greedy += [int(model.feed([token]).argmax()) for token in following]
        decode.append(options.steps / (time.perf_counter() - begin))
        model.reset()
        begin = time.perf_counter()
        model.feed(tokens[: options.prompt])
        prefill.append(options.prompt / (time.perf_counter() - begin))
    results = {"decode": decode[1:], "prefill": prefill[1:], "open": opened - start, "first_token": first_token}
    print(json.dumps({**results, "greedy": greedy}))
