"""Time and memory of tracing a released model's graph without weights.

    python bench/trace_real_size.py [RECIPE ...]        default: glm-4.5-air-fp8 glm-4.7-fp8

Each recipe is traced in a process of its own; prints seconds, CPU seconds and peak resident memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time


def main() -> None:
    for recipe in sys.argv[1:] or ["glm-4.5-air-fp8", "glm-4.7-fp8"]:
        with tempfile.TemporaryDirectory() as folder:
            command = ["build", "--no-weights", "--recipe", recipe, "-o", f"{folder}/graph", "--quiet"]
            start = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "glm_export.exporter.cli", *command], stdout=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.monotonic() - start
            graph = os.path.getsize(f"{folder}/graph/model.onnx") / 1e6
        print(
            f"{recipe}: {seconds:.1f} s, {usage.ru_utime + usage.ru_stime:.1f} CPU s, "
            f"peak {usage.ru_maxrss / 1e6:.2f} GB, model.onnx {graph:.1f} MB, exit {os.waitstatus_to_exitcode(status)}"
        )


if __name__ == "__main__":
    main()
