"""An fp8 build of a checkpoint larger than memory against `cp` of the same bytes, and `plan` against both.

    python bench/build_throughput.py WORK [--recipe glm-4.5-air-fp8] [--layers 7] [--threads 2] [--keep]

WORK is a folder on the disk to measure. A checkpoint of random weights with the recipe's real shapes is made there as
`checkpoint` (31 GB at 7 layers of GLM-4.5-Air) unless there is one, copied, and built, each time with nothing of it in
the page cache. Where the disk has no room for the whole copy, some of the shards are copied. Last, the quantizer alone:
per CPU, from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from glm_export.exporter.layout import groups
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.storage import BLOCK_ELEMENTS
from glm_export.plugins.fp8_native import quantize_rows

PROGRAM = (sys.executable, "-m", "glm_export.exporter.cli")


def settle(checkpoint: Path) -> None:
    """Writes out what is dirty, and drops the checkpoint from the page cache."""
    os.sync()
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied_shards(checkpoint: Path) -> list[Path]:
    """All shards, or as many as leave a tenth of what is free."""
    room = shutil.disk_usage(checkpoint).free * 9 // 10
    shards = sorted(checkpoint.glob("*.safetensors"))
    return [shard for i, shard in enumerate(shards) if sum(s.stat().st_size for s in shards[: i + 1]) <= room]


def timed(command: list[str]) -> tuple[float, float, int, str, str]:
    """Seconds, CPU seconds and peak resident bytes of a command, its stdout and stderr."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, err
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out, err


def quantizer(size: int = 512 << 20, rounds: int = 5) -> None:
    """The quantizer on one CPU, in the blocks of a build from memory that no cache holds, beside the copy of numpy."""
    source = torch.randn(size // 4096 // 2, 4096).bfloat16()
    raw = source.view(torch.uint8).numpy().reshape(-1)
    target = np.zeros(size, dtype=np.uint8)

    def quantize() -> None:
        for block in source.split(BLOCK_ELEMENTS // 4096):
            quantize_rows(block)

    best = {"quantize": 0.0, "copy": 0.0}
    for _ in range(rounds):
        for name, work in (("quantize", quantize), ("copy", lambda: np.copyto(target, raw))):
            started = time.perf_counter()
            work()
            best[name] = max(best[name], size / (time.perf_counter() - started))
    # The quantizer reads two bytes and writes one per number, the copy reads and writes each byte.
    share = 1.5 * best["quantize"] / (2 * best["copy"])
    print(f"quantizer: {best['quantize'] / 1e9:.2f} GB/s of bfloat16 per CPU", end="")
    print(f", {100 * share:.0f}% of the bytes that a copy moves ({2 * best['copy'] / 1e9:.1f} GB/s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipe", default="glm-4.5-air-fp8")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", action="store_true", help="the checkpoint, for the next time")
    options = parser.parse_args()
    torch.set_num_threads(1)

    checkpoint, copy, bundle = (options.work / name for name in ("checkpoint", "copy", "bundle"))
    recipe = ["--recipe", options.recipe, "--layers", str(options.layers)]
    if not checkpoint.exists():
        model = load_recipe(options.recipe).model
        assert model is not None
        write_random_checkpoint(model.with_layers(options.layers), checkpoint, mtp=False)
    source = sum(path.stat().st_size for path in checkpoint.iterdir())
    found = Checkpoint.open(checkpoint)
    layer = max(
        sum(piece.tensor.nbytes for parameter in members for piece in found.pieces(parameter))
        for members in groups(found.config).values()
    )
    print(f"checkpoint: {source / 1e9:.2f} GB, its largest layer {layer / 1e9:.2f} GB, load {os.getloadavg()[0]:.1f}")

    settle(checkpoint)
    shards = copied_shards(checkpoint)
    copy.mkdir()
    seconds, cpu, *_ = timed(["cp", *map(str, shards), str(copy)])
    size = sum(shard.stat().st_size for shard in shards)
    copied = size / seconds
    print(f"cp of {size / 1e9:.2f} GB: {seconds:.1f} s, {copied / 1e9:.2f} GB/s, {cpu:.1f} CPU s")
    started = time.perf_counter()
    settle(checkpoint)
    print(f"    and {time.perf_counter() - started:.1f} s more until it was on disk")
    shutil.rmtree(copy)
    settle(checkpoint)

    build = [str(checkpoint), *recipe, "-o", str(bundle), "--threads", str(options.threads)]
    *_, out, _ = timed([*PROGRAM, "plan", *build, "--json"])
    planned = json.loads(out)
    settle(checkpoint)
    seconds, cpu, peak, out, err = timed([*PROGRAM, "build", *build, "--json"])
    weights = float(re.search(r"writing fp8 weights: ([\d.]+) s", err)[1])
    size = json.loads(out)["bytes"] + (bundle / "manifest.json").stat().st_size
    rate = source / weights
    print(f"build: {seconds:.1f} s, of which weights {weights:.1f} s, {cpu:.1f} CPU s, {options.threads} threads")
    print(f"    {rate / 1e9:.2f} GB/s of the checkpoint, {100 * rate / copied:.0f}% of cp's input rate")
    print(f"    peak resident {peak / 1e9:.2f} GB, allowed {(3 * layer + (2 << 30)) / 1e9:.2f} GB")
    for name, unit, plan, actual in (
        ("disk", 1e9, planned["disk"], size),
        ("memory", 1e9, planned["memory"], peak),
        ("seconds", 1, planned["seconds"], seconds),
    ):
        print(f"plan: {name} {plan / unit:.3f}, actual {actual / unit:.3f}, {100 * (plan / actual - 1):+.1f}%")
    started = time.perf_counter()
    subprocess.run([*PROGRAM, "verify", str(bundle), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    print(f"verify: {size / (time.perf_counter() - started) / 1e9:.2f} GB/s")
    shutil.rmtree(bundle)
    if not options.keep:
        shutil.rmtree(checkpoint)
    quantizer()


if __name__ == "__main__":
    main()
