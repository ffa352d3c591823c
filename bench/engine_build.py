"""Time and memory of building a bundle's TensorRT-RTX engine, which needs no GPU.

    python bench/engine_build.py BUNDLE [OPTION ...]        options of `glm-export engine`, such as --sm 89

The build runs in a process of its own, in a copy of the bundle that shares nothing with it; prints the estimate that
the command makes and what was used: seconds, peak resident memory and its ratio to the weights, size of the plan.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    source, options = Path(sys.argv[1]), sys.argv[2:]
    with tempfile.TemporaryDirectory(dir=source.resolve().parent) as folder:
        bundle = Path(shutil.copytree(source, f"{folder}/bundle"))
        command = ["engine", str(bundle), "--target", "tensorrt-rtx", "--replace", "--json", *options]
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "glm_export.exporter.cli", *command], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if code := os.waitstatus_to_exitcode(status):
            sys.exit(code)
        info = json.loads(text)
        weights = sum(path.stat().st_size for path in (bundle / "weights").iterdir())
    peak = usage.ru_maxrss * 1024
    print(
        f"{source.name} for {', '.join(info['compute_capabilities'])}: {info['build_seconds']:.1f} s to build, "
        f"{seconds:.1f} s with hashing, {usage.ru_utime + usage.ru_stime:.1f} CPU s; weights {weights / 1e9:.2f} GB, "
        f"plan {info['plan_bytes'] / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB = {peak / weights:.2f} x the weights"
    )


if __name__ == "__main__":
    main()
