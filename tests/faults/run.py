"""Breaks builds in every way we could think of, and prints what came of it: `make faults` writes docs/faults.md.

Passing means, for every case: the bundle's directory is absent or verifies, the next build completes it without writing
a finished file again, the result is what a clean build makes, the checkpoint is untouched, and the user saw at most one
sentence. Every random choice comes from the seed.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import workbench
from workbench import EVERY_KIND, FULL_AT, SHORT_WRITE, WRITE, BrokenPromiseError, Fault, Outcome, Workbench, finish

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.errors import GlmExportError

ROOT = Path(__file__).resolve().parents[2]
KINDS = "open for writing, write, fsync, rename, link, mkdir, unlink, truncate and allocate"


@dataclass
class Row:
    """One line of the table."""

    what: str
    cases: int = 0
    unmet: int = 0
    """Cases whose fault did not happen, such as a kill after the end: they count as passed builds, not as cases."""
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    remark: str = ""


class Faults:
    """All rows. `scale` divides the number of cases, for a quick run."""

    def __init__(self, bench: Workbench, *, seed: int, scale: int) -> None:
        self.bench = bench
        self.random = random.Random(seed)
        self.scale = scale
        self.rows: list[Row] = []

    def run(self) -> None:
        """Fills the rows."""
        self.every_call(errno.EIO, EVERY_KIND, "every call that changes files failed once with EIO")
        self.every_call(errno.ENOSPC, EVERY_KIND, "every call that changes files failed once with ENOSPC")
        self.every_call(SHORT_WRITE, WRITE, "every write cut short once")
        self.kills(200)
        self.kills_of_a_replacement(100)
        self.disk_full(20)
        self.two_builders(50, lock=True)
        self.two_builders(50, lock=False)
        self.damage(2000)

    def every_call(self, what: int, kinds: int, title: str) -> None:
        """Fails the first call, then the second and so on, until a build meets no fault."""
        with self._row(title) as row:
            at = self.random.randint(1, self.scale)
            while True:
                out = self.bench.fresh("call")
                outcome = self.bench.build(out, fault=Fault(kinds=kinds, at=at, what=what))
                if outcome.failed == 0:
                    self.bench.discard(out)
                    break
                self._judge(
                    row, f"call {at}", out, lambda out=out, outcome=outcome: self._check_code(out, outcome, what)
                )
                at += self.scale

    def kills(self, count: int) -> None:
        """SIGKILL at random moments of a build's time."""
        started = time.monotonic()
        out = self.bench.fresh("kill")
        self.bench.build(out)
        self.bench.discard(out)
        duration = time.monotonic() - started
        with self._row("SIGKILL at random moments, then resumed") as row:
            while row.cases < self._scaled(count):
                moment = self.random.uniform(0, duration)
                out = self.bench.fresh("kill")
                outcome = self.bench.build(out, kill_after=moment)
                if outcome.code == 0:
                    row.unmet += 1
                    self.bench.discard(out)
                    continue
                name = f"killed after {moment:.4f} s"
                self._judge(row, name, out, lambda out=out, outcome=outcome: self.bench.check_after_fault(out, outcome))

    def kills_of_a_replacement(self, count: int) -> None:
        """SIGKILL while a bundle is replaced: it is there all the time, the old one or the new."""
        started = time.monotonic()
        out = self.bench.fresh("replace")
        shutil.copytree(self.bench.clean_bundle, out)
        self.bench.build(out, options=["--replace"])
        self.bench.discard(out)
        duration = time.monotonic() - started
        with self._row("SIGKILL while a good bundle is replaced") as row:
            for _ in range(self._scaled(count)):
                moment = self.random.uniform(0, duration)
                out = self.bench.fresh("replace")
                shutil.copytree(self.bench.clean_bundle, out)
                self.bench.build(out, kill_after=moment, options=["--replace"])
                self._judge(row, f"killed after {moment:.4f} s", out, lambda out=out: self._check_replaced(out))

    def _check_replaced(self, out: Path) -> None:
        self.bench.check_bundle(out)
        again = self.bench.build(out, options=["--replace"])
        if again.code != 0:
            raise BrokenPromiseError(f"the next build failed: {again}")
        self.bench.check_bundle(out)
        if left := [path.name for path in out.parent.iterdir() if path != out]:
            raise BrokenPromiseError(f"left behind: {left}")

    def disk_full(self, points: int) -> None:
        """A file system of its own, too small by more and less; afterwards it grows and the build resumes."""
        needed = sum(record.size for record in self.bench.clean.values())
        with self._row("disk full at points spread over the output, then given room") as row:
            points = self._scaled(points)
            for point in range(points):
                size = max(1, needed * (point + 1) // (points + 1)) // 4096 * 4096
                try:
                    self._full_file_system(row, size)
                except subprocess.CalledProcessError:
                    row.remark = "by a byte budget on writes: this machine does not allow mounting a file system"
                    self._full_by_budget(row, size)

    def _full_file_system(self, row: Row, size: int) -> None:
        out = self.bench.fresh("full")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(out.parent)]
        subprocess.run(command, check=True, capture_output=True)
        row.remark = "tmpfs of that size"
        try:
            # The program's own look at the free space would refuse at once, which is not what this is about.
            outcome = self.bench.build(out, prepare=_believe_in_space)

            def check() -> None:
                self._check_code(out, outcome, errno.ENOSPC, resume=False)
                subprocess.run(["mount", "-o", "remount,size=1g", str(out.parent)], check=True)
                self.bench.check_after_fault(out, outcome)

            self._judge(row, f"{size} bytes", out, check, discard=False)
        finally:
            subprocess.run(["umount", str(out.parent)], check=True)
            out.parent.rmdir()

    def _full_by_budget(self, row: Row, size: int) -> None:
        out = self.bench.fresh("full")
        outcome = self.bench.build(out, fault=Fault(kinds=WRITE, at=size, what=FULL_AT))
        self._judge(row, f"{size} bytes", out, lambda: self._check_code(out, outcome, errno.ENOSPC))

    def two_builders(self, rounds: int, *, lock: bool) -> None:
        """Two processes at once: one bundle, nobody's work mixed; the other says that somebody is building."""
        title = "two builders of one bundle" + ("" if lock else ", with file locks that do not lock")
        with self._row(title) as row:
            for _ in range(self._scaled(rounds)):
                out = self.bench.fresh("two")
                prepare = None if lock else _locks_do_nothing
                started = [self.bench.start(out, prepare=prepare), self.bench.start(out, prepare=prepare)]
                outcomes = [finish(*each) for each in started]
                self._judge(row, "round", out, lambda out=out, outcomes=outcomes: self._check_two(out, outcomes))

    def _check_two(self, out: Path, outcomes: list[Outcome]) -> None:
        codes = sorted(outcome.code for outcome in outcomes)
        # 2: the other one had finished before this one began ("already exists").
        if codes not in ([0, 7], [0, 2]):
            raise BrokenPromiseError(f"exit codes {codes}: {[outcome.err for outcome in outcomes]}")
        self.bench.check_bundle(out)
        self.bench.check_source()

    def damage(self, count: int) -> None:
        """A flipped bit, a cut, two swapped files: neither verify nor the loader may take such a bundle."""
        with self._row("bit flips, truncations and swaps, refused by verify and by the loader") as row:
            copy = self.bench.fresh("damage")
            shutil.copytree(self.bench.clean_bundle, copy)
            files = sorted(path for path in copy.rglob("*") if path.is_file())
            for _ in range(self._scaled(count)):
                row.cases += 1
                name, undo = _damage(files, self.random)
                try:
                    _check_refused(copy)
                except BrokenPromiseError as problem:
                    row.problems.append(f"{name}: {problem}")
                undo()
            self.bench.check_bundle(copy)
            self.bench.discard(copy)

    def _check_code(self, out: Path, outcome: Outcome, what: int, *, resume: bool = True) -> None:
        if what == errno.ENOSPC and outcome.code not in (0, 5):
            raise BrokenPromiseError(f"a full disk gave exit code {outcome.code}: {outcome.err!r}")
        self.bench.check_after_fault(out, outcome, resume=resume)

    def _judge(self, row: Row, name: str, out: Path, check: Callable[[], None], *, discard: bool = True) -> None:
        row.cases += 1
        try:
            check()
        except (BrokenPromiseError, GlmExportError) as problem:
            row.problems.append(f"{name}: {problem}")
        if discard:
            self.bench.discard(out)

    def _scaled(self, count: int) -> int:
        return max(1, count // self.scale)

    @contextmanager
    def _row(self, what: str) -> Iterator[Row]:
        row = Row(what)
        self.rows.append(row)
        started = time.monotonic()
        yield row
        row.seconds = time.monotonic() - started
        print(f"{what}: {row.cases} cases, {len(row.problems)} problems, {row.seconds:.0f} s", flush=True)
        for problem in row.problems[:5]:
            print(f"    {problem}", flush=True)


def _believe_in_space() -> None:
    real = shutil.disk_usage
    shutil.disk_usage = lambda path: real(path)._replace(free=1 << 40)  # type: ignore[assignment]


def _locks_do_nothing() -> None:
    """As flock behaves on some network file systems: everyone gets the lock."""
    import filelock

    filelock.FileLock._acquire = lambda self: setattr(self._context, "lock_file_fd", os.open(os.devnull, os.O_RDONLY))  # type: ignore[method-assign]
    filelock.FileLock._release = lambda self: setattr(self._context, "lock_file_fd", None)  # type: ignore[method-assign]


def _damage(files: list[Path], chance: random.Random) -> tuple[str, Callable[[], None]]:
    """Damages one file, or two; returns what was done and how to undo it."""
    kind = chance.choices(("flip", "cut", "swap"), (8, 1, 1))[0]
    path = chance.choice([file for file in files if file.stat().st_size])
    content = path.read_bytes()
    if kind == "swap":
        other = chance.choice([file for file in files if file.read_bytes() != content])
        theirs = other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(content)

        def undo() -> None:
            path.write_bytes(content)
            other.write_bytes(theirs)

        return f"{path.name} and {other.name} swapped", undo
    changed = bytearray(content)
    if kind == "cut":
        del changed[chance.randrange(len(changed)) :]
        name = f"{path.name} cut to {len(changed)} bytes"
    else:
        position, bit = chance.randrange(len(changed)), chance.randrange(8)
        changed[position] ^= 1 << bit
        name = f"{path.name} bit {bit} of byte {position}"
    path.write_bytes(changed)
    return name, lambda: (path.write_bytes(content), None)[1]


def _check_refused(bundle: Path) -> None:
    """Neither the full check of the loader nor verify may take it; both say so in one of our own errors."""
    try:
        Bundle.open(bundle, check="full")
    except GlmExportError:
        pass
    else:
        raise BrokenPromiseError("the loader took it")
    try:
        if Bundle.open(bundle, check="manifest").verify():
            raise BrokenPromiseError("verify took it")
    except GlmExportError:
        pass


def _table(rows: list[Row], seed: int) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        "# Faults",
        "",
        "What became of builds that met a fault. `make faults` runs all of it and writes this page.",
        "",
        "A case passes if the bundle's directory is then absent or verifies; the next build completes it, without",
        "writing a finished file again, to exactly what a clean build makes; the checkpoint is untouched; and the user",
        f"saw at most one sentence. The calls that change files are: {KINDS}.",
        "",
        "| fault | cases | passed | how |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.cases} | {row.cases - len(row.problems)} | {row.remark} |" for row in rows),
        "",
        f"{time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}, seed {seed}, {os.cpu_count()} cores, "
        f"{sum(row.seconds for row in rows):.0f} s.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Runs everything; the exit code is 1 if anything broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=int, default=1, help="divides the number of cases")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    options = parser.parse_args()
    workbench.with_shim(sys.argv)
    with tempfile.TemporaryDirectory(prefix="glm-export-faults-") as root:
        faults = Faults(Workbench(Path(root)), seed=options.seed, scale=options.scale)
        faults.run()
    table = _table(faults.rows, options.seed)
    print(table)
    if options.write:
        options.write.parent.mkdir(exist_ok=True)
        options.write.write_text(table)
    return int(any(row.problems for row in faults.rows))


if __name__ == "__main__":
    sys.exit(main())
