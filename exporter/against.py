"""One engine of a bundle against another, on the same tokens, through Polygraphy.

Polygraphy runs both and compares; what it runs are our sessions. Its own TensorRT loaders allow host code in a plan and
know nothing of the manifest's hashes, its runners copy every KV cache to the host and back in each step, and numpy has
no bfloat16 to pass between them. With `save_outputs`, everything further can be done with Polygraphy's command line.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from glm_export.exporter.compare import Comparison, Tolerance, Verdict, table
from glm_export.exporter.progress import Reporter
from glm_export.exporter.recipe import Recipe
from glm_export.exporter.validate import (
    Floats,
    decode,
    open_engine_session,
    random_prompts,
    reference_logits,
    report_path,
    sizes,
    tolerances,
    with_embeddings,
)
from glm_export.exporter.weights import reference_of_bundle
from glm_export.plugins.library import PORTABLE, forced_cpu
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import ENGINE_TARGETS
from glm_export.runtime.errors import UsageError
from glm_export.runtime.files import write_text_durably
from glm_export.runtime.session import Session

_PAIR_FACTOR = 2**0.5
"""Two engines err in unrelated directions: their distance is that of one to the reference, in quadrature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AgainstReport:
    """The outcome of a comparison of two engines. True if they agree."""

    bundle: str
    target: str
    against: str
    precision: str
    prompt_lengths: tuple[int, ...]
    steps: int
    engines: Comparison
    first: Comparison
    """The engine of `target` and the reference."""
    second: Comparison
    """The engine of `against` and the reference."""
    noise: Comparison
    verdict: Verdict

    @property
    def passed(self) -> bool:
        """Whether the engines are within the tolerance of each other."""
        return bool(self.verdict)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        compared = {"engines": self.engines, "first": self.first, "second": self.second, "noise": self.noise}
        return {
            "passed": self.passed,
            "bundle": self.bundle,
            "target": self.target,
            "against": self.against,
            "precision": self.precision,
            "prompt_lengths": list(self.prompt_lengths),
            "steps": self.steps,
            "verdict": self.verdict.to_dict(),
            **{name: comparison.to_dict() for name, comparison in compared.items()},
        }

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"{self.bundle} ({self.precision}): {self.target} against {self.against}, {len(self.prompt_lengths)} rows "
            f"with prompts of {', '.join(map(str, self.prompt_lengths))} tokens, prefill and {self.steps} cached steps",
            *table([self.engines, self.first, self.second, self.noise]),
            f"{'passed' if self else 'FAILED'}: {self.verdict}",
        ]


class SessionRunner(BaseRunner):  # type: ignore[misc]
    """A session as a Polygraphy runner: one inference is a prefill and the steps after it, with given tokens.

    Inputs: prompt_ids [B,P] int64, right-padded; prompt_length [B] int64; tokens [N,B] int64, fed one after the other.
    Output: logits [N+1,B,V] float32, after the prompt and after each token.
    """

    def __init__(self, name: str, open_one: Callable[[], Session]) -> None:
        super().__init__(name=name)
        self._open_one = open_one

    def activate_impl(self) -> None:
        """Opens the session, with all its checks."""
        self.session = self._open_one()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The inputs above."""
        inputs = {"prompt_ids": (None, None), "prompt_length": (None,), "tokens": (None, None)}
        metadata = TensorMetadata()
        for name, shape in inputs.items():
            metadata.add(name, dtype=np.int64, shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Runs prompt and tokens."""
        prompt_ids, lengths = feed_dict["prompt_ids"], feed_dict["prompt_length"]
        prompts = [row[:length].tolist() for row, length in zip(prompt_ids, lengths, strict=True)]
        started = time.monotonic()
        _, logits = decode(self.session, prompts, len(feed_dict["tokens"]), forced_NB=feed_dict["tokens"])
        self.inference_time = time.monotonic() - started
        return OrderedDict(logits=logits)

    def deactivate_impl(self) -> None:
        """Closes the session."""
        self.session.close()
        del self.session


def validate_against(
    bundle: Bundle,
    *,
    target: str,
    against: str,
    prompts: int | None = None,
    prompt_tokens: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    save_outputs: Path | None = None,
    reporter: Reporter,
) -> AgainstReport:
    """Compares two engines of the bundle and writes reports/<target>-against-<against>.json.

    The tokens are random and the same for both. The reference computes them too: it shows which engine is off, and how
    much the order of sums alone does to this model.

    Args:
        bundle: an opened bundle.
        target: an engine.
        against: another one; `portable` is onnxruntime without our kernels.
        prompts: rows; like the next three, the recipe's number when None.
        prompt_tokens: length of the longest prompt.
        steps: cached steps.
        seed: of the random tokens.
        threads: CPU threads of onnxruntime.
        save_outputs: a JSON file for Polygraphy's tools, of the tokens' logits by both.
        reporter: where progress goes.

    Raises:
        UsageError: both are the same, or a number below 1.
        AccuracyError: logits that are not finite.
        BackendError, InputError, IntegrityError, ResourceError: an engine can not be opened or run.
    """
    if target == against:
        raise UsageError(f"--against {against} is the engine itself: name another one.")
    bundle.require_weights()
    rows, longest, steps, seed = sizes(
        Recipe.from_dict(bundle.manifest.recipe).validate, prompts, prompt_tokens, steps, seed
    )
    vocab_size = bundle.manifest.contract.vocab_size
    prompt_ids = random_prompts(vocab_size, rows, longest, seed)
    tokens_NB = np.random.default_rng(seed + 1).integers(0, vocab_size, (steps, rows))
    padded = np.array([row + [0] * (longest - len(row)) for row in prompt_ids], np.int64)
    feed = {"prompt_ids": padded, "prompt_length": np.array(list(map(len, prompt_ids))), "tokens": tokens_NB}

    def runner(name: str) -> SessionRunner:
        def open_one() -> Session:
            with forced_cpu(PORTABLE) if name == "portable" else contextlib.nullcontext():
                engine = "onnxruntime" if name == "portable" else name
                cpu_threads = None if name in ENGINE_TARGETS else threads
                return with_embeddings(
                    open_engine_session(bundle, engine, rows=rows, tokens=longest + steps, threads=cpu_threads)
                )

        return SessionRunner(name, open_one)

    with reporter.stage(f"running {target} and {against}"), G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(
            [runner(target), runner(against)],
            data_loader=[feed],
            save_outputs_path=None if save_outputs is None else str(save_outputs),
        )
    with reporter.stage("running the precision-aware reference"):
        reference = reference_logits(reference_of_bundle(bundle, stream=True), prompt_ids, tokens_NB)
    with reporter.stage("running its permuted twin"):
        twin = reference_logits(reference_of_bundle(bundle, stream=True, permute_seed=seed), prompt_ids, tokens_NB)

    precision = bundle.manifest.precision
    noise = Comparison.of(f"{precision} reference - its twin", twin, reference)
    rounds_most = next((one for one in (target, against) if one in ENGINE_TARGETS), target)
    layers = bundle.manifest.contract.num_hidden_layers
    overall, per_line = map(_of_a_pair, tolerances(precision, layers, rounds_most))

    def compare(first: Mapping[str, Floats], second: Mapping[str, Floats]) -> OrderedDict[str, AgainstReport]:
        engines = Comparison.of(f"{target} - {against}", first["logits"], second["logits"])
        report = AgainstReport(
            bundle=bundle.manifest.name,
            target=target,
            against=against,
            precision=precision,
            prompt_lengths=tuple(map(len, prompt_ids)),
            steps=steps,
            engines=engines,
            first=Comparison.of(f"{target} - {precision} reference", first["logits"], reference),
            second=Comparison.of(f"{against} - {precision} reference", second["logits"], reference),
            noise=noise,
            verdict=Verdict.of(engines, noise, overall=overall, per_line=per_line),
        )
        return OrderedDict(logits=report)

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        [accuracy] = Comparator.compare_accuracy(results, compare_func=compare)
    [iteration] = accuracy[target, against]
    report: AgainstReport = iteration["logits"]
    path = report_path(bundle, f"reports/{target}-against-{against}.json")
    write_text_durably(path, json.dumps(report.to_dict(), indent=1))
    return report


def _of_a_pair(tolerance: Tolerance) -> Tolerance:
    return Tolerance(bound=_PAIR_FACTOR * tolerance.bound, reason=f"sqrt 2 x {tolerance.reason}")
