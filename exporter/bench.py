"""How fast a bundle runs on this machine, and how near that is to what the machine allows.

Everything is repeated, and each repetition lies between two measurements of the machine itself, so that a share of its
bandwidth is one of the same second. The tokens are random with a fixed seed; they are given, not chosen by the model.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from glm_export.exporter.bench_report import Measurement, Memory, Opening, Report, Run
from glm_export.exporter.machine import Machine, Rates, Resident
from glm_export.exporter.needs import ModelNeeds, Needs
from glm_export.exporter.progress import Reporter
from glm_export.plugins.library import Kernels, cpu_library
from glm_export.plugins.work import Work
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import ENGINE_TARGETS
from glm_export.runtime.errors import UsageError
from glm_export.runtime.generate import PREFILL_CHUNK, decode_step, prefill
from glm_export.runtime.open import default_batch, open_session
from glm_export.runtime.session import Session

PREFILL = (128, 512, 2048)
CONTEXT = (128, 1024, 8192)
BATCH = (1, 8)
REPEATS = 5

_STEPS = 16  # of decoding, in a repetition
_PROMPT = 512  # tokens before the first token
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured, as far as there is room for it."""

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    repeats: int

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        target: str,
        *,
        lengths: Sequence[int] | None,
        contexts: Sequence[int] | None,
        batches: Sequence[int] | None,
        repeats: int,
        capacity: int | None,
    ) -> Plan:
        """Chooses what is None.

        Raises:
            UsageError: what is asked for does not fit the capacity or the model's positions.
        """
        positions = bundle.manifest.max_position_embeddings
        room = min(capacity or positions, positions)
        rows = default_batch(bundle, target) if target in ENGINE_TARGETS else max(BATCH)
        plan = cls(lengths=tuple(lengths or ()), contexts=tuple(sorted(contexts or ())), batches=(), repeats=repeats)
        if plan.capacity > room:
            raise UsageError(
                f"The prompts and contexts need room for {plan.capacity} tokens per row, {plan.steps} of them for "
                f"steps, and there is room for {room}: ask for shorter ones, or for a larger --capacity."
            )
        return replace(
            plan,
            lengths=plan.lengths if lengths is not None else tuple(each for each in PREFILL if each <= room),
            contexts=plan.contexts
            if contexts is not None
            else tuple(each for each in CONTEXT if each + plan.steps <= room),
            batches=tuple(each for each in BATCH if each <= rows) if batches is None else tuple(batches),
        )

    @property
    def steps(self) -> int:
        """Decoded after each context, the warm-up with them."""
        return (self.repeats + 1) * _STEPS

    @property
    def capacity(self) -> int:
        """What all of it needs."""
        return max([0, *self.lengths, *(context + self.steps for context in self.contexts)])


def bench(
    bundle: Bundle,
    plan: Plan,
    *,
    target: str,
    check_seconds: float,
    threads: int | None = None,
    capacity: int | None = None,
    reporter: Reporter,
) -> Report:
    """Measures opening and memory; prefill by length and decoding by context in the first batch; decoding by batch.

    Args:
        bundle: an opened bundle.
        plan: what to measure.
        target: the engine to run.
        check_seconds: how long it took to open and check the bundle.
        threads: of the session, and of what measures the machine; as many as there are CPUs when None.
        capacity: tokens per row; what the plan needs when None, or what the engine has.
        reporter: is told the stages.

    Raises:
        GlmExportError: as `open_session` and `Session.step`.
    """
    on_cpu = target not in ENGINE_TARGETS
    threads = threads or len(os.sched_getaffinity(0))
    if on_cpu and capacity is None:
        capacity = max(plan.capacity, _STEPS + 1)

    def opened(batch: int) -> Session:
        return open_session(bundle, target=target, batch=batch, capacity=capacity, threads=threads if on_cpu else None)

    before, started = Resident.now(), time.perf_counter()
    with opened(plan.batches[0]) as session:
        open_seconds, after_opening = time.perf_counter() - started, Resident.now()
        rows = _Rows.of(bundle, session)
        prompt = rows.random_tokens(min(_PROMPT, session.capacity - _STEPS))
        with reporter.stage(f"the first token after {len(prompt[0])}"):
            started = time.perf_counter()
            prefill(session, prompt).argmax(-1)
            prompt_seconds = time.perf_counter() - started
        prompted = Resident.now()
        rows.decode(_STEPS)
        memory = Memory(
            weight_bytes=sum(f.size for path, f in bundle.manifest.files.items() if path.endswith(".safetensors")),
            cache_bytes=rows.needs.cache_token_bytes * session.batch * session.capacity,
            before=before,
            opened=after_opening,
            prompted=prompted,
            decoded=Resident.now(),
        )
        machine, bandwidths = None, None
        if on_cpu and cpu_library():
            machine = Machine(threads=threads, bf16=bundle.manifest.contract.compute_dtype == "bfloat16")
            bandwidths = machine.survey(_largest_weight_file(bundle))
        measurements = [
            *_prefills(rows, plan, machine, reporter),
            *_decodes(rows, plan.contexts, plan, machine, reporter),
        ]
    for batch in plan.batches[1:]:
        with opened(batch) as session:
            measurements += _decodes(_Rows.of(bundle, session), plan.contexts[:1], plan, machine, reporter)
    return Report(
        bundle=bundle.manifest.name,
        precision=bundle.manifest.precision,
        target=target,
        kernels=rows.kernels.isa if rows.kernels else None,
        threads=threads,
        repeats=plan.repeats,
        seed=_SEED,
        opening=Opening(
            check_seconds=check_seconds,
            open_seconds=open_seconds,
            prompt_tokens=len(prompt[0]),
            prompt_seconds=prompt_seconds,
        ),
        memory=memory if on_cpu else None,
        arithmetic=machine.arithmetic if machine else None,
        bandwidths=bandwidths,
        measurements=tuple(measurements),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """A session that is fed random tokens, with an account of what its steps need."""

    session: Session
    needs: ModelNeeds
    kernels: Kernels | None
    random: np.random.Generator

    @classmethod
    def of(cls, bundle: Bundle, session: Session) -> _Rows:
        return cls(
            session=session,
            needs=ModelNeeds.of(bundle, session),
            kernels=getattr(session, "kernels", None),
            random=np.random.default_rng(_SEED),
        )

    def random_tokens(self, count: int) -> list[list[int]]:
        """So many for every row."""
        vocabulary = self.session.contract.vocab_size
        tokens: list[list[int]] = self.random.integers(0, vocabulary, (self.session.batch, count)).tolist()
        return tokens

    def fill(self, context: int) -> None:
        """Has every row hold so many tokens."""
        if self.session.length.max() > context:
            self.session.reset()
        missing = context - int(self.session.length.max())
        if missing:
            prefill(self.session, self.random_tokens(missing))

    def prefill(self, length: int) -> Run:
        """A prompt for every row, from an empty cache."""
        self.session.reset()
        prompt = self.random_tokens(length)
        before, started = self._work(), time.perf_counter()
        prefill(self.session, prompt)
        seconds, done = time.perf_counter() - started, self._work() - before
        chunk = min(PREFILL_CHUNK, self.session.max_step_tokens or PREFILL_CHUNK)
        starts = range(0, length, chunk)
        experts = self._experts(done, len(starts), self.session.batch * chunk)
        needs = None
        if experts is not None:
            steps = [self._step(min(chunk, length - start), start, experts) for start in starts]
            needs = sum(steps[1:], steps[0])
        return Run(seconds=seconds, rates=None, needs=needs, experts=experts)

    def decode(self, steps: int) -> Run:
        """So many steps of one token for every row; the middle one counts."""
        held = int(self.session.length.max())
        seconds, python, outside = [], [], []
        first = self._work()
        for _ in range(steps):
            [*tokens] = (row[0] for row in self.random_tokens(1))
            before, started = self._work(), time.perf_counter()
            decode_step(self.session, tokens)
            seconds.append(time.perf_counter() - started)
            engine = self.session.engine_seconds
            if engine is not None:
                python.append(seconds[-1] - engine)
            if engine is not None and self.kernels:
                outside.append(engine - (self._work() - before).seconds)
        experts = self._experts(self._work() - first, steps, self.session.batch)
        middle = held + (steps - 1) // 2
        return Run(
            seconds=statistics.median(seconds),
            rates=None,
            needs=None if experts is None else self._step(1, middle, experts),
            experts=experts,
            python_seconds=statistics.median(python) if python else None,
            outside_seconds=statistics.median(outside) if outside else None,
        )

    def _work(self) -> Work:
        return Work.so_far() if self.kernels else Work(seconds=0, experts=0)

    def _experts(self, done: Work, steps: int, tokens: int) -> float | None:
        """Per layer and step of so many tokens: as the kernels counted them, or as many as one token chooses."""
        if not self.needs.expert_layers:
            return 0
        if self.kernels:
            return done.experts / (steps * self.needs.expert_layers)
        return self.needs.top_k if tokens == 1 else None

    def _step(self, new: int, held: int, experts: float) -> Needs:
        return self.needs.step(batch=self.session.batch, new=new, held=held, experts=experts * self.needs.expert_layers)


def _prefills(rows: _Rows, plan: Plan, machine: Machine | None, reporter: Reporter) -> Iterator[Measurement]:
    for length in plan.lengths:
        with reporter.stage(f"prefill of {length}"):
            runs = _between_rates(machine, functools.partial(rows.prefill, length), plan.repeats)
        yield Measurement(what="prefill", length=length, batch=rows.session.batch, runs=runs)


def _decodes(
    rows: _Rows, contexts: Sequence[int], plan: Plan, machine: Machine | None, reporter: Reporter
) -> Iterator[Measurement]:
    for context in contexts:
        with reporter.stage(f"decoding {rows.session.batch} after {context}"):
            rows.fill(context)
            runs = _between_rates(machine, functools.partial(rows.decode, _STEPS), plan.repeats)
        yield Measurement(what="decode", length=context, batch=rows.session.batch, runs=runs)


def _between_rates(machine: Machine | None, run: Callable[[], Run], repeats: int) -> tuple[Run, ...]:
    """Runs once to warm up, then repeatedly, with a look at the machine before and after each."""
    run()
    runs = []
    before = machine.rates() if machine else None
    for _ in range(repeats):
        done = run()
        after = machine.rates() if machine else None
        runs.append(replace(done, rates=Rates.mean(before, after) if before and after else None))
        before = after
    return tuple(runs)


def _largest_weight_file(bundle: Bundle) -> Path:
    largest = max(
        (path for path in bundle.manifest.files if path.endswith(".safetensors")),
        key=lambda path: bundle.manifest.files[path].size,
    )
    return bundle.file(largest, hashed=False)
