"""Runs the command line in this process, on a tiny checkpoint and its bundles, which are made once for all tests."""

import contextlib
import functools
import io
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from glm_export.exporter.cli import execute
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe

_ROOT = tempfile.TemporaryDirectory(prefix="glm-export-test-")
ERROR = "glm-export: error: "


@dataclass(frozen=True)
class Called:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The sentence of the one error."""
        (line,) = (line for line in self.err.splitlines() if line.startswith(ERROR))
        return line.removeprefix(ERROR)


def call(*arguments: object) -> Called:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = execute([str(argument) for argument in arguments])
    return Called(code, out.getvalue(), err.getvalue())


def refused(code: int, *arguments: object) -> str:
    """Asserts that a command fails as it should, and returns its sentence."""
    called = call(*arguments)
    assert called.code == code, called
    assert called.out == ""
    assert "Traceback" not in called.err
    return called.error


@functools.cache
def checkpoint() -> Path:
    """The tiny recipe's model in several shards."""
    directory = Path(_ROOT.name) / "checkpoint"
    model = load_recipe("tiny").model
    assert model is not None
    write_random_checkpoint(model, directory, shard_bytes=300_000)
    return directory


@functools.cache
def bundle(precision: str) -> Path:
    directory = Path(_ROOT.name) / precision
    called = call("build", checkpoint(), "-o", directory, "--recipe", "tiny", "--precision", precision, "--quiet")
    assert called.code == 0, called
    return directory


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
