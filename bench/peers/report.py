"""The tables of `run.py`: medians over the rounds, with ranges where the spread matters."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from work import Work

STEADY = 1.1
"""How far apart the meter before and the one after may be if they are to tell about the time between."""

Result = dict[str, Any]
"""One peer in one round: what `protocol.measure` printed, and its name, weights, round, peak and meter."""


def tables(results: list[Result], work: Work, prompt: int) -> str:
    """Markdown: what every peer reached, how our sessions compare with each, and the machine meanwhile."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result["name"], []).append(result)
    reference = _reference(by_name)
    lines = [
        "| | decode tok/s | GB/s | % of read rate | prefill tok/s | GFLOP/s | % of FLOP rate | peak MiB | open s "
        "| first token s | same greedy | rounds |",
        "|---" * 12 + "|",
    ]
    lines += [_line(name, *_row(rows, work, prompt, reference)) for name, rows in by_name.items()]

    ours = [name for name in by_name if name.startswith("own ")]
    columns = [(own, what) for own in ours for what in ("decode", "prefill")]
    lines += ["", _line("ratio to", *(f"{own} {what}" for own, what in columns)), "|---" * (len(columns) + 1) + "|"]
    for name, rows in by_name.items():
        if name not in ours:
            lines.append(_line(name, *(_ratio(by_name[own], rows, what) for own, what in columns)))
    lines.append("")
    for what, unit in (("read", "GB/s"), ("flops", "GFLOP/s")):
        lines.append(f"The meter read {_spread((row['after'][what] for row in results), 1)} {unit} ({what}).")
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _row(rows: list[Result], work: Work, prompt: int, reference: list[int]) -> list[str]:
    decode, prefill = ([statistics.median(row[what]) for row in rows] for what in ("decode", "prefill"))
    moved = [rate * work.decode_bytes(rows[0]["weights"]) / 1e9 for rate in decode]
    computed = [rate * work.prefill_flops(prompt) / 1e9 for rate in prefill]
    return [
        _spread(decode, 1),
        f"{statistics.median(moved):.1f}",
        _share(moved, rows, "read"),
        _spread(prefill, 0),
        f"{statistics.median(computed):.0f}",
        _share(computed, rows, "flops"),
        f"{max(row['peak'] for row in rows) / 2**20:.0f}",
        *(_spread((row[what] for row in rows), 2) if what in rows[0] else "" for what in ("open", "first_token")),
        _agreement(rows[0].get("greedy"), reference),
        str(len(rows)),
    ]


def _share(rates: list[float], rows: list[Result], what: str) -> str:
    """Per cent of what the meter read, of the rounds in which it read the same before and after; empty without one."""
    shares = []
    for rate, row in zip(rates, rows, strict=True):
        low, high = sorted((row["before"][what], row["after"][what]))
        if high <= STEADY * low:
            shares.append(100 * rate / ((low + high) / 2))
    return _spread(shares, 0)


def _ratio(ours: list[Result], theirs: list[Result], what: str) -> str:
    """Ours over theirs, of the rounds that have both."""
    by_round = {row["round"]: statistics.median(row[what]) for row in theirs}
    pairs = [(statistics.median(row[what]), by_round[row["round"]]) for row in ours if row["round"] in by_round]
    return _spread((mine / other for mine, other in pairs), 2)


def _reference(by_name: dict[str, list[Result]]) -> list[int]:
    """The greedy choices of transformers, whose model it is, or else of the first session in bfloat16."""
    found = [rows[0] for rows in by_name.values() if rows[0]["weights"] == "bf16" and "greedy" in rows[0]]
    found.sort(key=lambda row: not row["name"].startswith("transformers"))
    return found[0]["greedy"] if found else []


def _agreement(greedy: list[int] | None, reference: list[int]) -> str:
    if greedy is None or len(greedy) != len(reference):
        return ""
    return f"{sum(a == b for a, b in zip(greedy, reference, strict=True))}/{len(reference)}"


def _spread(values: Iterable[float], digits: int) -> str:
    found = list(values)
    if not found:
        return ""
    middle = f"{statistics.median(found):.{digits}f}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.{digits}f}-{max(found):.{digits}f})"
