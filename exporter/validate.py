"""Proves, number by number, how close an engine is to the PyTorch reference.

The engine decodes seeded prompts of different lengths: prefill in two chunks, then N greedy cached steps. The same
tokens then go through the references in one pass without any cache, so that cache, ragged rows and chunks are part of
what is proven, and a model of any size is read once, layer by layer:

    engine against the precision-aware reference   judged: same weights and roundings, only the order of sums differs
    that reference against its permuted twin       the noise: what the order of sums alone does to this model
    engine against the float32 reference           drift: what the precision costs (reported; judged by no one here)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from glm_export.exporter.compare import Comparison, Tolerance, Verdict, table
from glm_export.exporter.layout import QUANTIZED
from glm_export.exporter.model import Glm4MoeForCausalLM
from glm_export.exporter.progress import Reporter
from glm_export.exporter.recipe import Recipe, Validate
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.weights import bundle_config, read_bundle, reference_of_bundle, reference_of_checkpoint
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.contract import COMPUTE_DTYPES
from glm_export.runtime.engine_info import ENGINE_TARGETS
from glm_export.runtime.errors import InputError, IntegrityError, UsageError
from glm_export.runtime.files import write_text_durably
from glm_export.runtime.generate import decode_step, prefill
from glm_export.runtime.open import open_session
from glm_export.runtime.session import Session, StepOutput

Floats = npt.NDArray[np.float32]

REPORT = "reports/validation.json"

_ROUNDOFF = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit roundoff of the activations; in float32 a few ulps, because engines use an exp, sin and cos of their own."""

_E4M3_NOISE = 2.0**-4 * (1 / 6) ** 0.5
"""Root mean square of E4M3's relative rounding error: uniform within 2^-4 of a mantissa that is uniform in 1..2, so
2^-4 / sqrt(3) * sqrt(mean of 1/m^2) = 0.0255."""


def tolerances(
    precision: str, layers: int, target: str = "onnxruntime", cache_dtype: str | None = None
) -> tuple[Tolerance, Tolerance]:
    """Bounds on the relative L2 of an engine's logits to its precision-aware reference: overall; per row or step.

    Both compute the same products and differ in the order of float32 sums, which now and then turns a rounding around.
    At worst all roundings of the residual stream are unrelated: 2 updates per layer, embedding and final norm, each of
    one unit roundoff, in quadrature. In FP8 a row whose early tokens saw such a turn in a quantizer carries it in its
    cache; at worst the two runs' E4M3 errors are unrelated (sqrt 2), in two quantizers one after the other (sqrt 2).

    TensorRT also rounds at other places than the reference: a product before its bias, queries after their scale,
    probabilities. From there on the roundings inside of an update are unrelated as well, and no update is larger than
    the stream: in attention 9 in a row (norm, projection, bias, q norm, scale, probabilities, values, projection, the
    update's own), in an MLP 6 (norm, up, SiLU, down, the sum with the shared expert, the update's own).

    A quantized head rounds what it reads right before the logits, where no stream dilutes the turns: at worst its E4M3
    errors are unrelated in every row (sqrt 2), and it is the third quantizer of those one after the other.

    Caches coarser than the activations may turn around, too: at worst keys and values of every layer are unrelated
    roundings to the cache's dtype.
    """
    dtype = COMPUTE_DTYPES[precision]
    per_layer = 9 + 6 if target in ENGINE_TARGETS and dtype != "float32" else 2
    updates = 2 * layers + 2
    where = f"{updates} updates" if per_layer == 2 else f"and around {updates} updates"
    stream = Tolerance(bound=_ROUNDOFF[dtype] * (per_layer * layers + 2) ** 0.5, reason=f"{dtype} roundoff in {where}")
    if cache_dtype and _ROUNDOFF[cache_dtype] > _ROUNDOFF[dtype]:
        stream = Tolerance(
            bound=(stream.bound**2 + 2 * layers * _ROUNDOFF[cache_dtype] ** 2) ** 0.5,
            reason=f"{stream.reason}, {cache_dtype} roundoff in {2 * layers} caches",
        )
    if precision not in QUANTIZED:
        return stream, stream
    in_a_row = 2
    if "lm_head" in QUANTIZED[precision]:
        in_a_row = 3
        stream = Tolerance(
            bound=(stream.bound**2 + 2 * _E4M3_NOISE**2) ** 0.5,
            reason=f"{stream.reason}, unrelated E4M3 rounding in the head's quantizer",
        )
    quantizers = Tolerance(
        bound=(2 * in_a_row) ** 0.5 * _E4M3_NOISE, reason=f"unrelated E4M3 rounding in {in_a_row} quantizers"
    )
    return stream, max(stream, quantizers, key=lambda tolerance: tolerance.bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of a validation. True if the engine passed."""

    bundle: str
    target: str
    precision: str
    cache_dtype: str | None
    """Of the KV caches; None is the compute dtype, or what the engine was built with."""
    prompt_lengths: tuple[int, ...]
    steps: int
    engine: Comparison
    noise: Comparison
    drift: Comparison | None
    verdict: Verdict

    @property
    def passed(self) -> bool:
        """Whether the engine is within the tolerance."""
        return bool(self.verdict)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        compared = {"engine": self.engine, "noise": self.noise, "drift": self.drift}
        return {
            "passed": self.passed,
            "bundle": self.bundle,
            "target": self.target,
            "precision": self.precision,
            "cache_dtype": self.cache_dtype,
            "prompt_lengths": list(self.prompt_lengths),
            "steps": self.steps,
            "verdict": self.verdict.to_dict(),
            **{name: comparison and comparison.to_dict() for name, comparison in compared.items()},
        }

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"{self.bundle} ({self.precision}, {self.target}): {len(self.prompt_lengths)} rows with prompts of "
            f"{', '.join(map(str, self.prompt_lengths))} tokens, prefill and {self.steps} cached steps",
            *table([self.engine, self.noise, *([self.drift] if self.drift else [])]),
            f"{'passed' if self else 'FAILED'}: {self.verdict}",
        ]


def validate(
    bundle: Bundle,
    *,
    target: str = "onnxruntime",
    checkpoint: Path | None = None,
    drift: bool = True,
    prompts: int | None = None,
    prompt_tokens: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    cache_dtype: str | None = None,
    reporter: Reporter,
) -> Report:
    """Compares an engine of the bundle with the references and writes reports/validation.json.

    Args:
        bundle: an opened bundle.
        target: which engine.
        checkpoint: where the source is, if it is not where it was at the build.
        drift: whether to compare with the float32 reference, which needs the checkpoint.
        prompts: rows; like the next three, the recipe's number when None.
        prompt_tokens: length of the longest prompt.
        steps: cached steps.
        seed: of the random prompts.
        threads: CPU threads of the engine.
        cache_dtype: of the KV caches, of engine and precision-aware reference; the compute dtype when None.
        reporter: where progress goes.

    Raises:
        InputError: the checkpoint is needed and is missing, or is another one.
        IntegrityError: the bundle does not say where it is from, or its reports would go elsewhere.
        AccuracyError: logits that are not finite.
        UsageError: a number below 1, or the engine has no caches of that dtype.
    """
    recipe = Recipe.from_dict(bundle.manifest.recipe).validate
    rows, longest, steps, seed = sizes(recipe, prompts, prompt_tokens, steps, seed)
    bundle.require_weights()
    # Before anything that takes long.
    source = _source(bundle, checkpoint) if drift else None
    path = report_path(bundle)

    prompt_ids = random_prompts(bundle.manifest.contract.vocab_size, rows, longest, seed)
    with (
        reporter.stage(f"running the {target} engine"),
        open_engine_session(
            bundle, target, rows=rows, tokens=longest + steps, threads=threads, cache_dtype=cache_dtype
        ) as session,
    ):
        tokens, engine = decode(with_embeddings(session), prompt_ids, steps)
    with reporter.stage("running the precision-aware reference"):
        reference = reference_logits(reference_of_bundle(bundle, stream=True), prompt_ids, tokens, cache_dtype)
    with reporter.stage("running its permuted twin"):
        twin_model = reference_of_bundle(bundle, stream=True, permute_seed=seed)
        twin = reference_logits(twin_model, prompt_ids, tokens, cache_dtype)
    fp32 = None
    if source:
        with reporter.stage("running the float32 reference"):
            fp32 = reference_logits(reference_of_checkpoint(source, stream=True), prompt_ids, tokens)

    manifest = bundle.manifest
    comparison = Comparison.of(f"engine - {manifest.precision} reference", engine, reference)
    noise = Comparison.of(f"{manifest.precision} reference - its twin", twin, reference)
    overall, per_line = tolerances(manifest.precision, manifest.contract.num_hidden_layers, target, cache_dtype)
    report = Report(
        bundle=manifest.name,
        target=target,
        precision=manifest.precision,
        cache_dtype=cache_dtype,
        prompt_lengths=tuple(map(len, prompt_ids)),
        steps=steps,
        engine=comparison,
        noise=noise,
        drift=None if fp32 is None else Comparison.of("engine - fp32 reference (drift)", engine, fp32),
        verdict=Verdict.of(comparison, noise, overall=overall, per_line=per_line),
    )
    write_text_durably(path, json.dumps(report.to_dict(), indent=1))
    return report


def report_path(bundle: Bundle, report: str = REPORT) -> Path:
    """Where a report goes: never through a link, which could lead out of the bundle.

    Raises:
        IntegrityError: it would.
    """
    path = bundle.directory / report
    with suppress(FileExistsError):
        path.parent.mkdir()
    if path.parent.is_symlink() or not path.parent.is_dir():
        raise IntegrityError(f"{path.parent} is no folder of the bundle, but a link or a file: remove it.")
    return path


def _source(bundle: Bundle, given: Path | None) -> Checkpoint:
    identity = dict(bundle.manifest.source)
    recorded, ignored = identity.pop("path", None), identity.get("ignored_config_keys", [])
    if not isinstance(recorded, str) or not isinstance(ignored, list):
        raise IntegrityError(f"The manifest of {bundle.directory} does not say what it was built from: use --no-drift.")
    path = given or Path(recorded)
    if not path.is_dir():
        raise InputError(
            f"The checkpoint is no longer at {path}: say where it is with --checkpoint, or leave the drift out with "
            "--no-drift."
        )
    checkpoint = Checkpoint.open(path, ignored)
    seen = checkpoint.identity()
    if any(seen[key] != identity.get(key) for key in seen):
        raise InputError(f"{path} is not the checkpoint this bundle was built from: use the original, or --no-drift.")
    return checkpoint.with_layers(bundle.manifest.contract.num_hidden_layers)


def sizes(
    recipe: Validate, prompts: int | None, prompt_tokens: int | None, steps: int | None, seed: int | None
) -> tuple[int, int, int, int]:
    """Rows, longest prompt, cached steps and seed: the recipe's where None.

    Raises:
        UsageError: a number below 1, or a negative seed.
    """
    rows, longest, steps, seed = (
        given if given is not None else default
        for given, default in (
            (prompts, recipe.prompts),
            (prompt_tokens, recipe.prompt_tokens),
            (steps, recipe.steps),
            (seed, recipe.seed),
        )
    )
    if min(rows, longest, steps) < 1 or seed < 0:
        raise UsageError(f"{rows} prompts of {longest} tokens, {steps} steps, seed {seed}: expected 1 or more of each.")
    return rows, longest, steps, seed


def open_engine_session(
    bundle: Bundle, target: str, *, rows: int, tokens: int, threads: int | None, cache_dtype: str | None = None
) -> Session:
    """Opens a session for `rows` prompts of up to `tokens` tokens; an engine with sizes of its own keeps them."""
    if target in ENGINE_TARGETS:
        return open_session(bundle, target=target, threads=threads, cache_dtype=cache_dtype)
    capacity = min(tokens, bundle.manifest.max_position_embeddings)
    return open_session(bundle, target=target, batch=rows, capacity=capacity, threads=threads, cache_dtype=cache_dtype)


def random_prompts(vocab_size: int, rows: int, longest: int, seed: int) -> list[list[int]]:
    """Random tokens; the first prompt is the longest, the last has one token, the others lie between."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(longest, 1, rows).round().astype(int)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def decode(
    session: Session,
    prompts: Sequence[Sequence[int]],
    steps: int,
    *,
    forced_NB: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.int64], Floats]:
    """The tokens [N, B] of N steps, greedy ones unless they are given, and the logits [N+1, B, V].

    Stop tokens do not stop. Prompts beyond the session's rows are decoded in waves.
    """
    chunk = max(len(prompt) for prompt in prompts) // 2 + 1
    waves = []
    for first in range(0, len(prompts), session.batch):
        wave = prompts[first : first + session.batch]
        session.reset()
        logits = [prefill(session, wave, chunk)[: len(wave)]]
        tokens = []
        for step in range(steps):
            chosen = logits[-1].argmax(-1) if forced_NB is None else forced_NB[step, first : first + len(wave)]
            tokens.append(chosen)
            logits.append(decode_step(session, chosen.tolist())[: len(wave)].copy())
        waves.append((np.stack(tokens), np.stack(logits)))
    all_tokens, all_logits = zip(*waves, strict=True)
    return np.concatenate(all_tokens, axis=1), np.concatenate(all_logits, axis=1)


def reference_logits(
    model: Glm4MoeForCausalLM,
    prompts: Sequence[Sequence[int]],
    tokens_NB: npt.NDArray[np.int64],
    cache_dtype: str | None = None,
) -> Floats:
    """A reference's logits [N+1, B, V] at the same places, from one pass over prompt and tokens.

    Nothing was cached before; keys and values are rounded to cache_dtype, or to the compute dtype when it is None.
    """
    steps = len(tokens_NB)
    ids = [[*prompt, *tokens_NB[:, row].tolist()] for row, prompt in enumerate(prompts)]
    longest = max(map(len, ids))
    ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    length_B = torch.tensor([len(row) for row in ids])
    places_BN = (length_B - 1 - steps).unsqueeze(1) + torch.arange(steps + 1)
    with torch.no_grad():
        caches = model.empty_caches(len(ids), longest, getattr(torch, cache_dtype) if cache_dtype else None)
        logits_BNV = model(ids_BS, caches=caches, length=length_B, logits_to_keep=places_BN).logits
    return cast(Floats, logits_BNV.transpose(0, 1).numpy())


def with_embeddings(session: Session) -> Session:
    """The session itself, or one that looks up the embeddings which its engine wants in place of token ids."""
    if not session.contract.inputs_embeds:
        return session
    config = bundle_config(session.bundle)
    table_VD = read_bundle(session.bundle, config)("model.embed_tokens.weight").float().numpy()
    step = session.step

    def step_with_lookup(tokens: npt.NDArray[Any], counts: npt.NDArray[Any] | None = None) -> StepOutput:
        return step(table_VD[tokens], counts)

    session.step = step_with_lookup  # type: ignore[method-assign]
    return session
