"""Stages of tasks (plugins/cpu/flow.h) under the thread sanitizer, which cannot follow ONNX Runtime's threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=thread", "-pthread", f"-I{REPOSITORY}"]


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    sources = [str(REPOSITORY / name) for name in ("tests/plugins/flow_check.cpp", "plugins/cpu/flow.cpp")]
    subprocess.run(["c++", *FLAGS, *flags, *sources, "-o", str(folder / "check")], check=True)
    # Without randomization of addresses: the sanitizer wants places of its own.
    command = ["setarch", "--addr-no-randomize", str(folder / "check")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_stages_wait_for_what_they_need(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stage_that_does_not_wait_is_seen(tmp_path: Path) -> None:
    done = run(tmp_path, "-DPLANTED")
    assert done.returncode != 0
    assert "data race" in done.stderr or "too early" in done.stderr
