"""A seeded small part of `make faults`, which the suite can afford."""

import os
import subprocess
import sys
from pathlib import Path


def test_builds_survive_faults(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(Path(__file__).with_name("run.py")),
        "--scale",
        "10",
        "--write",
        str(tmp_path / "t.md"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line.split("|")[1:4] for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 9
    assert all(int(cases) == int(passed) > 0 for _, cases, passed in rows)
