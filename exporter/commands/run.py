"""`glm-export run`: prompts in, continuations out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glm_export.exporter.commands.options import (
    COUNT,
    PATH,
    CommaSeparated,
    bundle_argument,
    cache_dtype_option,
    json_option,
    open_bundle,
    print_json,
    quiet_option,
    target_option,
    threads_option,
    trust_size_option,
)
from glm_export.runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from glm_export.runtime.generate import Generation
    from glm_export.runtime.text import Text

_DEFAULT_NEW_TOKENS = 128


@click.command()
@bundle_argument
@click.argument("stdin", metavar="[-]", required=False, type=click.Choice(("-",)))
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; can be repeated.")
@click.option("--ids", multiple=True, type=CommaSeparated(int), metavar="1,2,3", help="A prompt as token ids.")
@click.option("--prompts-file", type=PATH, metavar="FILE", help="One prompt per line.")
@click.option(
    "--max-new-tokens", type=COUNT, metavar="N", help=f"Per prompt; without, {_DEFAULT_NEW_TOKENS} or what fits."
)
@target_option
@click.option("--capacity", type=COUNT, metavar="C", help="Tokens per row of the KV cache; without, the bundle's.")
@click.option("--batch", type=COUNT, metavar="B", help="Prompts at a time; without, at most the bundle's.")
@cache_dtype_option
@threads_option
@click.option("--ignore-eos", is_flag=True, help="Go on after a stop token.")
@click.option(
    "--save-logits",
    type=PATH,
    metavar="FILE.npy",
    help="float32 [steps, vocabulary]: one row for every token chosen, a stop token included; prompt after prompt.",
)
@trust_size_option
@quiet_option
@json_option
def run(
    bundle_path: Path,
    stdin: str | None,
    texts: tuple[str, ...],
    ids: tuple[tuple[int, ...], ...],
    prompts_file: Path | None,
    max_new_tokens: int | None,
    target: str,
    capacity: int | None,
    batch: int | None,
    cache_dtype: str | None,
    threads: int | None,
    ignore_eos: bool,
    save_logits: Path | None,
    trust_size: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Continue prompts greedily.

    `-` reads one prompt from standard input. The text of a single prompt is printed as it is generated. With --json
    every prompt gives one line, texts before ids, with prompt_ids, token_ids (without the stop token), finish_reason
    (stop or length) and, where the bundle has a tokenizer, text.
    """
    texts = (*texts, *_lines(prompts_file), *_standard_input(stdin))
    if not texts and not ids:
        raise UsageError("There is no prompt: give --prompt, --ids, --prompts-file or -.")
    if save_logits and not save_logits.parent.is_dir():  # said before the work, not after it
        raise InputError(f"{save_logits.parent} is no folder: make it, or save the logits elsewhere.")

    import numpy as np

    from glm_export.exporter.progress import Reporter
    from glm_export.runtime.generate import generate
    from glm_export.runtime.open import default_batch, open_session
    from glm_export.runtime.text import Text

    reporter = Reporter(quiet=quiet)
    bundle = open_bundle(bundle_path, reporter, trust_size=trust_size, threads=threads)
    text = Text.open(bundle) if texts or bundle.tokenizer_path else None
    prompts = [*(text.encode(_encodable(prompt)) for prompt in texts if text), *map(list, ids)]
    streamed = _Streamed(text) if text and len(prompts) == 1 and not as_json else None
    logits: list[list[np.ndarray[Any, Any]]] = [[] for _ in prompts]

    with reporter.stage("opening the bundle"):
        rows = batch or min(default_batch(bundle, target), len(prompts))
        session = open_session(
            bundle, target=target, batch=rows, capacity=capacity, threads=threads, cache_dtype=cache_dtype
        )
    with session:
        room = session.capacity - max(map(len, prompts))
        started = time.monotonic()
        generations = generate(
            session,
            prompts,
            max_new_tokens=max_new_tokens or max(1, min(_DEFAULT_NEW_TOKENS, room)),
            stop_ids=() if ignore_eos else None,
            on_token=streamed,
            on_logits=(lambda index, row: logits[index].append(row.copy())) if save_logits else None,
        )
        seconds = time.monotonic() - started
    if streamed:
        streamed.finish()
    else:
        _print(prompts, generations, text.decode if text else None, as_json=as_json)
    if save_logits:
        with save_logits.open("wb") as file:
            np.save(file, np.stack([row for rows in logits for row in rows]))
    reporter.note(f"{sum(len(each.tokens) for each in generations)} tokens in {seconds:.1f} s")


class _Streamed:
    """Prints the text of one prompt's tokens as they come."""

    def __init__(self, text: Text) -> None:
        self._stream = text.stream()

    def __call__(self, _: int, token: int) -> None:
        click.echo(self._stream.push(token), nl=False)

    def finish(self) -> None:
        click.echo(self._stream.finish())


def _print(
    prompts: Sequence[Sequence[int]],
    generations: Sequence[Generation],
    decode: Callable[[Sequence[int]], str] | None,
    *,
    as_json: bool,
) -> None:
    for index, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        text = {"text": decode(generation.tokens)} if decode else {}
        if as_json:
            result = {"prompt_ids": list(prompt), "token_ids": list(generation.tokens)}
            print_json(result | {"finish_reason": generation.finish} | text)
            continue
        if len(prompts) > 1:
            click.echo(f"==> prompt {index} <==")
        click.echo(text.get("text", ",".join(map(str, generation.tokens))))


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    lines = _decoded(path.read_bytes(), str(path)).removesuffix("\n").split("\n")
    if lines == [""]:
        raise InputError(f"{path} is empty: expected one prompt per line.")
    return [line.removesuffix("\r") for line in lines]


def _standard_input(stdin: str | None) -> list[str]:
    if stdin is None:
        return []
    return [_decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n")]


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 ({error.reason} at byte {error.start}): convert it.") from None


def _encodable(prompt: str) -> str:
    """Arguments that are not UTF-8 reach Python as lone surrogates, which no tokenizer takes."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("A prompt is not UTF-8: convert it, or give token ids.") from None
    return prompt
