"""What the machine can do at this moment, as one JSON line: GB/s read from memory, and GFLOP/s of bfloat16 products.

Where there is no instruction for these, float32 products, which they are then made of.
"""

from __future__ import annotations

import argparse
import json
import statistics

import numpy as np

from glm_export.plugins.meter import BLOCK_BYTES, multiply, read

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    memory = np.ones(64 * BLOCK_BYTES // 4, np.uint64)  # 384 MB: no cache holds it
    passes = [read(memory, threads=threads, block_bytes=BLOCK_BYTES).seconds for _ in range(REPEATS + 1)][1:]
    rates = [multiply("bfloat16", threads=threads) or multiply("float32", threads=threads) for _ in range(REPEATS)]
    print(
        json.dumps({"read": memory.nbytes / statistics.median(passes) / 1e9, "flops": statistics.median(rates) / 1e9})
    )


if __name__ == "__main__":
    main()
