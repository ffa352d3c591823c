"""A tiny build that runs in a forked child, with a fault armed, and what must be true afterwards whatever happened.

Forking a process that has imported everything makes a case cost a fraction of a second. The graph is traced once: the
faults are about files, and tracing touches none.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from glm_export.exporter import build as build_module
from glm_export.exporter.cli import execute
from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.files import FileRecord, sha256_of

HERE = Path(__file__).resolve().parent
LAYERS = 2  # one dense, one MoE: every kind of weight

OPEN, WRITE, SYNC, RENAME, MKDIR, UNLINK, TRUNCATE = 1, 2, 4, 8, 16, 32, 64
EVERY_KIND = OPEN | WRITE | SYNC | RENAME | MKDIR | UNLINK | TRUNCATE
SHORT_WRITE, FULL_AT = -1, -2

ERROR = "glm-export: error: "


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Which call of the build fails, and how."""

    kinds: int
    at: int
    """Of the calls of these kinds below the output's folder, from 1; with FULL_AT the bytes that fit."""
    what: int
    """An errno, SHORT_WRITE or FULL_AT."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    code: int
    """The exit code; minus the signal's number of a killed build."""
    err: str
    calls: int
    """Watched calls that were made; unknown (0) of a killed build."""
    failed: int
    """Of those, how many were made to fail."""


class BrokenPromiseError(AssertionError):
    """Something that must never happen did."""


def with_shim(arguments: Sequence[str]) -> None:
    """Starts this program again with the shim preloaded, if it is not."""
    if "GLM_FAULT_SHIM" in os.environ:
        return
    library = Path(tempfile.mkdtemp(prefix="glm-export-shim-")) / "shim.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    extra = {"GLM_FAULT_SHIM": str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *arguments], os.environ | extra)


class Workbench:
    """A checkpoint, what a clean build makes of it, and a folder to build in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoint = root / "checkpoint"
        model = load_recipe("tiny").model
        assert model is not None
        self.config: Glm4MoeConfig = model.with_layers(LAYERS)
        write_random_checkpoint(self.config, self.checkpoint, shard_bytes=150_000)
        self.source = _snapshot(self.checkpoint)
        self.clean_bundle = root / "clean" / "bundle"
        self.clean_bundle.parent.mkdir()
        with _same_trace_for_every_child():
            if code := execute([*self._command(self.clean_bundle), "--quiet"]):
                raise BrokenPromiseError(f"the clean build failed with exit code {code}")
        self.clean = _records(self.clean_bundle)

    def build(
        self,
        out: Path,
        *,
        fault: Fault | None = None,
        kill_after: float | None = None,
        options: Sequence[str] = (),
        prepare: Callable[[], None] | None = None,
    ) -> Outcome:
        """Builds in a forked child and waits for it; kills it after so many seconds."""
        pid, result = self.start(out, fault=fault, options=options, prepare=prepare)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return finish(pid, result)

    def start(
        self,
        out: Path,
        *,
        fault: Fault | None = None,
        options: Sequence[str] = (),
        prepare: Callable[[], None] | None = None,
    ) -> tuple[int, Path]:
        """Starts a build in a forked child; `finish` takes what it returns."""
        handle, name = tempfile.mkstemp(dir=self.root, prefix="result-")
        os.close(handle)
        pid = os.fork()
        if pid == 0:
            _child([*self._command(out), "--quiet", *options], out.parent, fault, prepare, Path(name))
        return pid, Path(name)

    def _command(self, out: Path) -> list[str]:
        return ["build", str(self.checkpoint), "-o", str(out), "--recipe", "tiny", "--layers", str(LAYERS)]

    def check_after_fault(self, out: Path, outcome: Outcome, *, resume: bool = True) -> None:
        """Asserts everything that is promised of a build that met a fault, and that the next one completes it.

        Raises:
            BrokenPromiseError: a promise is broken.
        """
        _check_sentence(outcome)
        if outcome.code == 0 and not out.exists():
            raise BrokenPromiseError("exit code 0 and no bundle")
        if out.exists():
            self.check_bundle(out)
        elif resume:
            before = _completed(out)
            again = self.build(out)
            if again.code != 0:
                raise BrokenPromiseError(f"the next build failed: {again}")
            self.check_bundle(out)
            redone = [name for name, inode in before.items() if (out / name).stat().st_ino != inode]
            if redone:
                raise BrokenPromiseError(f"completed files were written again: {redone}")
        self.check_source()

    def check_bundle(self, out: Path) -> None:
        """Asserts that a bundle verifies and is what a clean build makes."""
        report = Bundle.open(out).verify()
        if not report:
            raise BrokenPromiseError(f"the bundle does not verify: {report.problems}")
        if _records(out) != self.clean:
            raise BrokenPromiseError("the bundle is not what a clean build makes")

    def check_source(self) -> None:
        """Asserts that nobody touched the checkpoint."""
        if _snapshot(self.checkpoint) != self.source:
            raise BrokenPromiseError("the checkpoint was changed")

    def fresh(self, name: str) -> Path:
        """The place of a bundle in a new folder of its own."""
        folder = Path(tempfile.mkdtemp(dir=self.root, prefix=f"{name}-"))
        return folder / "bundle"

    def discard(self, out: Path) -> None:
        """Removes what `fresh` made."""
        shutil.rmtree(out.parent)


def finish(pid: int, result: Path) -> Outcome:
    """Waits for a child of `Workbench.start`."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    text = result.read_text()
    result.unlink()
    found = json.loads(text) if text else {"err": "", "calls": 0, "failed": 0}
    return Outcome(code=code, **found)


def _child(
    arguments: list[str], folder: Path, fault: Fault | None, prepare: Callable[[], None] | None, result: Path
) -> None:
    """Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        err = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the process ends with it
        os.dup2(err.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if prepare:
            prepare()
        shim = ctypes.CDLL(os.environ["GLM_FAULT_SHIM"])
        if fault:
            shim.fault_arm(os.fsencode(folder), fault.kinds, ctypes.c_long(fault.at), fault.what)
        code = execute(arguments)
        sys.stderr.flush()
        found = {"calls": shim.fault_calls(), "failed": shim.fault_failed()}
        shim.fault_arm(b"/nowhere", 0, ctypes.c_long(0), 0)
        err.seek(0)
        result.write_text(json.dumps({"err": err.read(), **found}))
    finally:
        os._exit(code)


@contextlib.contextmanager
def _same_trace_for_every_child() -> Iterator[None]:
    """Lets one build trace by itself, then hands what its trace would be to every child (which may change its copy)."""
    seen: list[tuple[Any, ...]] = []
    real = build_module.trace

    def remember(*arguments: Any) -> ir.Model:
        seen.append(arguments)
        return real(*arguments)

    build_module.trace = remember
    yield
    model = real(*seen[0])
    build_module.trace = lambda *_: model


def _check_sentence(outcome: Outcome) -> None:
    if outcome.code in (0, -signal.SIGKILL):
        return
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    sentences = [line for line in lines if line.startswith(ERROR)]
    if outcome.code not in (3, 5, 7) or "Traceback" in outcome.err or len(sentences) != 1:
        raise BrokenPromiseError(f"exit code {outcome.code}, stderr {outcome.err!r}")


def _completed(out: Path) -> dict[str, int]:
    """The files that an unfinished build has entered into its journal, with their inodes."""
    found = {}
    for staging in out.parent.glob(f"{out.name}.building*"):
        try:
            names = json.loads((staging / "journal.json").read_text())["files"]
        except FileNotFoundError:
            continue
        found |= {name: (staging / name).stat().st_ino for name in names if (staging / name).exists()}
    return found


def _records(bundle: Path) -> dict[str, FileRecord]:
    return dict(Bundle.open(bundle, check="manifest").manifest.files)


def _snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    return {path.name: (sha256_of(path), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}
