"""The CPU kernels against the portable bodies in stock ONNX Runtime, interleaved in one run.

    python bench/kernels.py BUNDLE [--prompt 32] [--steps 8] [--rounds 3] [--threads 2]

Prints tokens/s of prefill and decode (batch 1, medians and ranges over the rounds) and their ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np

from glm_export.plugins.library import CPU_VARIABLE
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.generate import decode_step, prefill
from glm_export.runtime.open import open_session
from glm_export.runtime.session import Session

MODES = {"kernels": "", "portable": "portable"}


def measure(session: Session, prompt: list[int], steps: int) -> tuple[float, float]:
    """Seconds per token: of the prefill, and the median of the decode steps."""
    session.reset()
    start = time.perf_counter()
    logits = prefill(session, [prompt])
    prefill_seconds = (time.perf_counter() - start) / len(prompt)
    token, seconds = int(logits[0].argmax()), []
    for _ in range(steps):
        start = time.perf_counter()
        token = int(decode_step(session, [token])[0].argmax())
        seconds.append(time.perf_counter() - start)
    return prefill_seconds, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    for name, default in (("prompt", 32), ("steps", 8), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()

    bundle = Bundle.open(options.bundle)
    prompt = np.random.default_rng(0).integers(0, bundle.manifest.contract.vocab_size, options.prompt).tolist()
    sessions = {}
    for mode, variable in MODES.items():
        os.environ[CPU_VARIABLE] = variable
        capacity = options.prompt + options.steps
        sessions[mode] = open_session(bundle, batch=1, capacity=capacity, threads=options.threads)
    results: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for round_ in range(options.rounds + 1):
        for mode, session in sessions.items():
            seconds = measure(session, prompt, options.steps)
            if round_:  # the first is warm-up
                results[mode].append(seconds)

    for index, what in enumerate(("prefill", "decode")):
        medians = {}
        for mode in MODES:
            rates = [1 / seconds[index] for seconds in results[mode]]
            medians[mode] = statistics.median(rates)
            print(f"{what:>8} {mode:>9}: {medians[mode]:>9.2f} tokens/s ({min(rates):.2f}-{max(rates):.2f})")
        print(f"{what:>8}     ratio: {medians['kernels'] / medians['portable']:>9.2f}")


if __name__ == "__main__":
    main()
