"""Does a decode step cost more with a larger cache capacity when the rows are equally long?

    python bench/cache_capacity.py BUNDLE [--length 256] [--capacities 1024,16384] [--steps 32] [--rounds 5]

Prints, per capacity: the median time of a decode step over interleaved rounds, its ratio to the smallest capacity's,
the size of the KV cache, and how much the resident memory grew while decoding (a copied cache would show there).
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import psutil

from glm_export.runtime.bundle import Bundle
from glm_export.runtime.generate import decode_step, prefill
from glm_export.runtime.open import open_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--capacities", default="1024,16384")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    bundle = Bundle.open(options.bundle)
    capacities = [int(c) for c in options.capacities.split(",")]
    prompt = np.random.default_rng(0).integers(0, bundle.manifest.contract.vocab_size, options.length).tolist()
    sessions = {c: open_session(bundle, batch=1, capacity=c, threads=options.threads) for c in capacities}
    times: dict[int, list[float]] = {c: [] for c in capacities}
    growth: dict[int, int] = dict.fromkeys(capacities, 0)
    process = psutil.Process()
    for round_ in range(options.rounds + 1):
        for capacity, session in sessions.items():
            session.reset()
            token = int(prefill(session, [prompt])[0].argmax())
            before = process.memory_info().rss
            for _ in range(options.steps):
                start = time.perf_counter()
                token = int(decode_step(session, [token])[0].argmax())
                if round_:  # the first is warm-up
                    times[capacity].append(time.perf_counter() - start)
            if round_:
                growth[capacity] = max(growth[capacity], process.memory_info().rss - before)

    base = statistics.median(times[capacities[0]])
    print(f"{'capacity':>9} {'cache MB':>9} {'ms/step (median)':>17} {'ratio':>6} {'RSS growth MB':>14}")
    for capacity, session in sessions.items():
        median = statistics.median(times[capacity])
        size = sum(session.cache(b.name).nbytes for b in session.contract.caches())
        times_and_ratio = f"{1e3 * median:>17.3f} {median / base:>6.2f}"
        print(f"{capacity:>9} {size / 1e6:>9.1f} {times_and_ratio} {growth[capacity] / 1e6:>14.2f}")


if __name__ == "__main__":
    main()
