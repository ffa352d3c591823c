"""What `exporter/bench.py` found: as JSON values and as a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glm_export.exporter.machine import Rates, Resident
from glm_export.exporter.needs import Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One repetition: a whole prefill, or the middle one of some steps of decoding."""

    seconds: float
    rates: Rates | None
    """Of the machine around it; None where it is not the CPU that computes."""
    needs: Needs | None
    """None where nobody counted the experts."""
    experts: float | None
    """Read per layer and step, on average."""
    python_seconds: float | None = None
    """Of a decoding step: outside the engine."""
    outside_seconds: float | None = None
    """Of a decoding step: in the engine, but outside our kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What was measured for one length and batch."""

    what: Literal["prefill", "decode"]
    length: int
    """Tokens per row: of the prompt; or in the cache, before the first step that was measured."""
    batch: int
    runs: tuple[Run, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values, each with its median, min and max over the runs; None where there is none.

        Shares are parts of 1. The roofline is the longer of the times that bandwidth and arithmetic allow.
        """
        tokens = self.batch * (self.length if self.what == "prefill" else 1)
        needs = [run.needs for run in self.runs if run.needs]
        rates = [run.rates for run in self.runs if run.rates]
        limits = [
            (run.needs.bytes / run.rates.bandwidth / run.seconds, run.needs.flops / run.rates.flops / run.seconds)
            for run in self.runs
            if run.needs and run.rates
        ]
        return {
            "what": self.what,
            "length": self.length,
            "batch": self.batch,
            "tokens_per_second": _spread(tokens / run.seconds for run in self.runs),
            "milliseconds": _spread(run.seconds * 1e3 for run in self.runs),
            "bytes_per_token": _spread(each.bytes / tokens for each in needs),
            "flops_per_token": _spread(each.flops / tokens for each in needs),
            "experts_per_layer": _spread(run.experts for run in self.runs),
            "bandwidth": _spread(each.bandwidth for each in rates),
            "flops": _spread(each.flops for each in rates),
            "bandwidth_share": _spread(memory for memory, _ in limits),
            "flops_share": _spread(arithmetic for _, arithmetic in limits),
            "roofline_share": _spread(max(both) for both in limits),
            "bound_by": _bound(limits),
            "python_microseconds": _spread(_micro(run.python_seconds) for run in self.runs),
            "outside_kernels_microseconds": _spread(_micro(run.outside_seconds) for run in self.runs),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """From a bundle on disk to the first token."""

    check_seconds: float
    """Of checking the files, which hashes them all unless their sizes are trusted."""
    open_seconds: float
    """Of opening the session."""
    prompt_tokens: int
    prompt_seconds: float
    """From the prompt to its first token, in a session that has done nothing yet."""

    @property
    def first_token_seconds(self) -> float:
        """From opening the session to the first token."""
        return self.open_seconds + self.prompt_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What the process took, before anything was measured that takes memory itself."""

    weight_bytes: int
    """All weight files."""
    cache_bytes: int
    before: Resident
    """Python and its libraries."""
    opened: Resident
    prompted: Resident
    """After the prompt of `Opening`."""
    decoded: Resident

    @property
    def peak_ratio(self) -> float:
        """The peak of everything over weights and caches."""
        return self.decoded.peak / (self.weight_bytes + self.cache_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of a benchmark."""

    bundle: str
    precision: str
    target: str
    kernels: str | None
    """The instruction set of our CPU kernels; None if others ran."""
    threads: int
    repeats: int
    seed: int
    opening: Opening
    memory: Memory | None
    """None where the weights are not in this process' memory."""
    arithmetic: str | None
    """What the machine's FLOP rate counts: bfloat16 or float32; None where the CPU does not compute."""
    bandwidths: dict[str, float] | None
    """Bytes per second, by what is read and how."""
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["opening"] = dataclasses.asdict(self.opening) | {
            "first_token_seconds": self.opening.first_token_seconds,
        }
        if self.memory:
            found["memory"] = dataclasses.asdict(self.memory) | {"peak_ratio": self.memory.peak_ratio}
        found["measurements"] = [each.to_dict() for each in self.measurements]
        return found

    def lines(self) -> Iterator[str]:
        """For people."""
        kernels = f"{self.kernels} kernels" if self.kernels else "no kernels of ours"
        yield f"{self.bundle}: {self.precision} on {self.target}, {kernels}, {self.threads} threads"
        opening = self.opening
        yield (
            f"opening: files checked in {opening.check_seconds:.2f} s, session open in {opening.open_seconds:.2f} s, "
            f"first token of a prompt of {opening.prompt_tokens} in {opening.prompt_seconds:.2f} s"
        )
        if self.memory:
            memory = self.memory
            stages = {"Python": memory.before, "open": memory.opened, "prompt": memory.prompted, "end": memory.decoded}
            own = ", ".join(f"{name} {_mb(resident.anonymous)}" for name, resident in stages.items())
            yield (
                f"memory: peak {_mb(memory.decoded.peak)} = {memory.peak_ratio:.2f} x ({_mb(memory.weight_bytes)} of "
                f"weights + {_mb(memory.cache_bytes)} of cache), {_mb(memory.decoded.file)} of it mapped files; "
                f"anonymous after {own}"
            )
        if self.bandwidths:
            reads = ", ".join(f"{what} {rate / 1e9:.1f}" for what, rate in self.bandwidths.items())
            yield f"machine: computes in {self.arithmetic}; reads in GB/s: {reads}"
        yield ""
        rows = [_HEAD, *(_row(each.to_dict()) for each in self.measurements)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


_HEAD = (
    *("", "tokens/s", "(min-max)", "ms", "MB/token", "MFLOP/token", "experts", "GB/s", "GFLOP/s"),
    *("of bandwidth", "of FLOPs", "of roofline", "(min-max)", "bound by", "Python us", "outside kernels us"),
)


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    def figure(name: str, factor: float, digits: int) -> str:
        return f"{found[name]['median'] * factor:.{digits}f}" if found[name] else "-"

    def percent(name: str) -> str:
        return f"{figure(name, 100, 0)}%" if found[name] else "-"

    def extremes(name: str, factor: float, digits: int) -> str:
        spread = found[name]
        return f"({spread['min'] * factor:.{digits}f}-{spread['max'] * factor:.{digits}f})" if spread else "-"

    return (
        f"{found['what']} {found['length']} x {found['batch']}",
        figure("tokens_per_second", 1, 1),
        extremes("tokens_per_second", 1, 1),
        figure("milliseconds", 1, 2),
        figure("bytes_per_token", 1e-6, 1),
        figure("flops_per_token", 1e-6, 0),
        figure("experts_per_layer", 1, 1),
        figure("bandwidth", 1e-9, 1),
        figure("flops", 1e-9, 0),
        percent("bandwidth_share"),
        percent("flops_share"),
        percent("roofline_share"),
        extremes("roofline_share", 100, 0),
        found["bound_by"] or "-",
        figure("python_microseconds", 1, 0),
        figure("outside_kernels_microseconds", 1, 0),
    )


def _spread(values: Iterable[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known)}


def _bound(limits: Sequence[tuple[float, float]]) -> str | None:
    if not limits:
        return None
    return "memory" if statistics.median(memory - arithmetic for memory, arithmetic in limits) > 0 else "arithmetic"


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
