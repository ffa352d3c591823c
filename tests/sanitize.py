"""The CPU kernels with the address and undefined-behaviour sanitizers, and pytest on them: `make sanitize`.

The library they are in has a package of its own, made of links to this one's files. It is found as any other is, and
nothing outside the tests knows of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
BUILD = REPOSITORY / "build/sanitize"
PACKAGE = BUILD / "package"
"""What to put on PYTHONPATH."""

OPTIONS = {
    # The interpreter and ONNX Runtime keep what they have until the end.
    "detect_leaks": "0",
    # What nobody wrote is no zero, which would be right too often, but NaN.
    "malloc_fill_byte": "255",
    "max_malloc_fill_size": str(1 << 30),
}


def build() -> None:
    """Builds what is new."""
    cmake = shutil.which("cmake")
    assert cmake, "the sanitizers need cmake"
    configure = [cmake, "-S", str(REPOSITORY), "-B", str(BUILD), "-DGLM_SANITIZE=ON", "-DGLM_CUDA=OFF"]
    compile = [cmake, "--build", str(BUILD), "--target", "glm_ops", "--parallel"]
    for command in (configure, compile):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    shutil.rmtree(PACKAGE, ignore_errors=True)
    plugins = PACKAGE / "glm_export/plugins"
    plugins.mkdir(parents=True)
    for folder in ("exporter", "runtime", "recipes"):
        (PACKAGE / "glm_export" / folder).symlink_to(REPOSITORY / folder)
    for file in (REPOSITORY / "plugins").iterdir():
        if file.suffix != ".so":
            (plugins / file.name).symlink_to(file)
    (plugins / "libglm_ops.so").symlink_to(BUILD / "libglm_ops.so")


def environment() -> dict[str, str]:
    """What a process needs in order to load a library that was compiled with the sanitizers."""
    runtimes = []
    for name in ("libasan.so", "libstdc++.so"):  # in this order; the first one looks for exceptions in the second
        command = ["c++", f"-print-file-name={name}"]
        runtimes.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        assert Path(runtimes[-1]).is_absolute(), f"the compiler has no {name}"
    options = ":".join(f"{name}={value}" for name, value in OPTIONS.items())
    changes = {"LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **changes, "PYTHONPATH": str(PACKAGE)}


def pytest_command(*arguments: str) -> list[str]:
    """A sanitizer writes to the process's own stderr before it ends it, so pytest must leave that alone."""
    return [sys.executable, "-m", "pytest", "--capture=sys", "-p", "no:cacheprovider", *arguments]


if __name__ == "__main__":
    build()
    chosen = sys.argv[1:] or ["tests/plugins", "-k", "kernel_ or test_library or test_fp8_native"]
    raise SystemExit(subprocess.run(pytest_command(*chosen), cwd=REPOSITORY, env=environment()).returncode)
