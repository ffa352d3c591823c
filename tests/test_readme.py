"""Every command in the README runs, and every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_runs(tmp_path):
    commands = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines() if line]
    assert len(commands) >= 8
    for program, *arguments in commands:
        assert program == "glm-export"
        run([sys.executable, "-m", "glm_export.exporter.cli", *arguments], tmp_path)
    (python,) = blocks("python")
    assert run([sys.executable, "-c", python], tmp_path).count("Generation(") == 2


def test_make_demo_runs(tmp_path):
    """With this interpreter's environment in place of a new one."""
    if not (Path(sys.prefix) / "bin/glm-export").exists():
        pytest.skip("glm-export is not installed in this environment; `make test` installs it")
    stamp = f"{sys.prefix}/.cpu"
    variables = [f"VENV={sys.prefix}", f"DEMO={tmp_path / 'demo'}"]
    out = run(["make", "-o", stamp, "demo", *variables], ROOT)
    assert "passed" in out


def test_ci_runs_the_test_command_and_nothing_else():
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "make test"
    assert "    make demo" in README
    assert "    make test" in README
    for target in ("demo", "test"):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", README))))
def test_links_lead_somewhere(link):
    assert not link.startswith(os.sep)
    assert (ROOT / link).exists(), link
