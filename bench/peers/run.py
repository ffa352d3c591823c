"""Our sessions beside transformers, llama.cpp, ik_llama.cpp and stock onnxruntime, interleaved in one run.

    glm-export make-checkpoint --config bench/peers/config.json -o WORK/checkpoint
    glm-export build WORK/checkpoint --precision fp8 -o WORK/fp8            and fp8-head, bf16
    python bench/peers/write_gguf.py WORK/checkpoint WORK/bf16.gguf --weights bf16         and q8_0 -o WORK/q8_0.gguf
    python bench/peers/run.py WORK [--rounds 5] [--llama-bench PATH]        measures, appends to WORK/results.jsonl
    python bench/peers/run.py WORK --rounds 0                               prints the tables of what is there

The model has 1.2 billion parameters, 64 experts of which 8 are chosen, and weights that spread tokens over them. Every
measurement is a process of its own: batch 1, decode of 64 fixed random tokens after 128, prefill of 512, one warm-up,
the median of 3 repeats, or one repeat where a peer is slow (protocol.py). Machines shared with others change by the
minute, so the meter runs before and after each, shares are of the mean of these two and of rounds in which they agree,
ratios are taken within a round, and tables show medians and ranges over the rounds. A peer that lacks what it needs is
left out with a sentence:

    own, onnxruntime   WORK/fp8, fp8-head, bf16; --python with glm_export, if another one than runs this and the meter
    transformers       WORK/checkpoint; --transformers-python with torch and transformers
    llama.cpp          WORK/*.gguf; --llama-python with llama-cpp-python, which pip compiles for this machine
    ik_llama.cpp       WORK/*.gguf; --llama-bench, built from its source, as it has no package
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import PROMPT
from report import tables
from work import Work

HERE = Path(__file__).parent

SLOW = ("--repeats", "1")
"""For peers that take most of a minute as it is."""

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A way to run the model."""

    name: str
    weights: str
    """Their format, a key of FORMATS."""
    script: str
    model: str
    """In WORK."""
    python: str
    needs: str | None = None
    """A Python package."""
    binary: str | None = None
    """A program."""
    options: tuple[str, ...] = ()
    cpu: str = ""
    """GLM_EXPORT_CPU."""

    def lacks(self, work: Path) -> str | None:
        """What is missing to measure this peer, as a sentence; None if nothing."""
        if not (work / self.model).exists():
            return f"{work / self.model} is missing: make it as `run.py --help` says."
        if self.script == "llama_bench.py" and not (self.binary and os.access(self.binary, os.X_OK)):
            return f"its llama-bench was not found ({self.binary}): build it from its source and give --llama-bench."
        if self.needs and subprocess.run([self.python, "-c", f"import {self.needs}"], capture_output=True).returncode:
            return f"{self.python} can not import {self.needs}: install it there, or name another Python."
        return None

    def command(self, work: Path) -> list[str]:
        binary = ["--binary", self.binary] if self.binary else []
        return [self.python, str(HERE / self.script), str(work / self.model), *binary, *self.options]


def peers(options: argparse.Namespace) -> Iterator[Peer]:
    """All of them, 8-bit weights before bfloat16."""
    own, hf, llama = options.python, options.transformers_python, options.llama_python
    package = "glm_export.runtime"
    for form in ("fp8", "fp8-head", "bf16"):
        yield Peer(name=f"own {form}", weights=form, script="own.py", model=form, python=own, needs=package)
    for form in ("q8_0", "bf16"):
        gguf = f"{form}.gguf"
        yield Peer(
            name=f"llama.cpp {form}", weights=form, script="llamacpp.py", model=gguf, python=llama, needs="llama_cpp"
        )
        for suffix, flags in (("", ()), (" repacked", ("--repack",))):
            yield Peer(
                name=f"ik_llama.cpp {form}{suffix}",
                weights=form,
                script="llama_bench.py",
                model=gguf,
                python=sys.executable,
                binary=options.llama_bench,
                options=flags,
            )
    for experts in ("eager", "grouped_mm"):
        yield Peer(
            name=f"transformers {experts}",
            weights="bf16",
            script="transformers_cpu.py",
            model="checkpoint",
            python=hf,
            needs="transformers",
            options=("--experts", experts, *SLOW),
        )
    for form in ("fp8", "bf16"):
        yield Peer(
            name=f"onnxruntime {form}",
            weights=form,
            script="own.py",
            model=form,
            python=own,
            needs=package,
            options=SLOW,
            cpu="portable",
        )


def output_of(command: list[str], environment: dict[str, str] | None = None) -> tuple[Result, int]:
    """The JSON object a command prints last, and the peak resident bytes of it and its children."""
    variables = os.environ | (environment or {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}, see above.")
    return json.loads(out.splitlines()[-1]), usage.ru_maxrss * 1024


def measure(options: argparse.Namespace, results: Path) -> None:
    """Appends a line per peer and round to the results."""
    known = {peer.name: peer for peer in peers(options)}
    chosen = []
    for name in options.only or known:
        if name not in known:
            raise SystemExit(f"There is no peer {name!r}: choose from {', '.join(known)}.")
        if reason := known[name].lacks(options.work):
            print(f"{name} is left out: {reason}", flush=True)
        else:
            chosen.append(known[name])
    if not chosen:
        return
    first = max((result["round"] for result in read(results)), default=-1) + 1
    if options.round is not None:
        first = options.round
    threads = ["--threads", str(options.threads)]
    meter = [sys.executable, str(HERE / "meter.py"), *threads]
    before, _ = output_of(meter)
    for round_ in range(first, first + options.rounds):
        for peer in chosen:
            command = [*peer.command(options.work), *threads]
            result, peak = output_of(command, {"GLM_EXPORT_CPU": peer.cpu, "TQDM_DISABLE": "1"})
            after, _ = output_of(meter)
            line = {"name": peer.name, "weights": peer.weights, "round": round_, "peak": peak, **result}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "before": before, "after": after}) + "\n")
            before = after
            decode, prefill = (statistics.median(result[what]) for what in ("decode", "prefill"))
            machine = f"{after['read']:.1f} GB/s, {after['flops']:.0f} GFLOP/s"
            print(f"{round_} {peer.name}: decode {decode:.1f}, prefill {prefill:.0f}; machine {machine}", flush=True)


def read(results: Path) -> list[Result]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", metavar="NAME", help="measure this peer; may be repeated")
    parser.add_argument("--round", type=int, help="number of the first round; the next one when not given")
    parser.add_argument("--results", default="results.jsonl", metavar="FILE", help="in WORK")
    for peer in ("", "transformers-", "llama-"):
        parser.add_argument(f"--{peer}python", default=sys.executable, metavar="PATH")
    parser.add_argument("--llama-bench", metavar="PATH", help="of ik_llama.cpp")
    options = parser.parse_args()

    results = options.work / options.results
    if options.rounds:
        measure(options, results)
    config = json.loads((options.work / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    if found := read(results):
        print(tables(found, Work.of(config), PROMPT))
    else:
        print(f"{results} has no results: nothing was measured.")


if __name__ == "__main__":
    main()
