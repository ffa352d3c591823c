"""The parent that waits for a command: exit codes, signals to one of the two or to both, and what kills the child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Touches a file when it is ready, then waits for a signal. What interrupts it counts what arrives.
PROGRAM = """
import os, pathlib, signal, sys, time
from glm_export.exporter.signals import Interrupted, interruptible
from glm_export.exporter.supervise import supervised

def work():
    with interruptible() as received:
        try:
            {body}
        except Interrupted:
            time.sleep(0.6)  # cleaning up; a second signal would end it at once
            print("stopped by", [each.name for each in received], flush=True)
            return 128 + received[0]

def explain(error):
    print(type(error).__name__, error, flush=True)
    return error.exit_code

sys.exit(supervised(work, explain))
"""
WAIT = "pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60); return 9"


def start(ready: Path, body: str = WAIT) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM.format(body=body), str(ready)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def child_of(ready: Path) -> int:
    until = time.monotonic() + 30
    while not (ready.exists() and ready.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    return int(ready.read_text())


@pytest.mark.parametrize("code", [0, 3, 141])
def test_the_exit_code_is_the_childs(tmp_path: Path, code: int) -> None:
    with start(tmp_path / "ready", f"print('once', flush=True); return {code}") as process:
        assert process.communicate(timeout=60)[0] == "once\n"
    assert process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("to", ["parent", "child", "both"])
def test_one_signal_reaches_the_command_once(tmp_path: Path, number: signal.Signals, to: str) -> None:
    with start(tmp_path / "ready") as process:
        child = child_of(tmp_path / "ready")
        if to == "both":  # as a terminal does
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if to == "parent" else child, number)
        assert process.communicate(timeout=60)[0] == f"stopped by ['{number.name}']\n"
    assert process.returncode == 128 + number


def test_a_second_signal_ends_the_command_at_once(tmp_path: Path) -> None:
    body = WAIT.replace("time.sleep(60)", "exec('try: time.sleep(60)\\nexcept Interrupted: time.sleep(60)')")
    with start(tmp_path / "ready", body) as process:
        child_of(tmp_path / "ready")
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGKILL, 5, "ResourceError The command ended early: it was killed (SIGKILL), as the kernel does"),
        (signal.SIGSEGV, 1, "GlmExportError The command was ended by SIGSEGV: this is a bug"),
    ],
    ids=["SIGKILL", "SIGSEGV"],
)
def test_a_killed_command_is_explained(tmp_path: Path, number: signal.Signals, code: int, sentence: str) -> None:
    with start(tmp_path / "ready") as process:
        os.kill(child_of(tmp_path / "ready"), number)
        assert process.communicate(timeout=60)[0].startswith(sentence)
    assert process.returncode == code


def test_killing_the_parent_ends_the_command(tmp_path: Path) -> None:
    with start(tmp_path / "ready") as process:
        child_of(tmp_path / "ready")
        process.kill()
        assert process.communicate(timeout=30)[0] == ""  # the pipe closes when the child is gone, too
