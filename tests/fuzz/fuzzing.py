"""Coverage-guided fuzzing with atheris: the first byte of an input chooses the target, the rest is for it."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import atheris
from targets import Target


def fuzz(targets: Mapping[str, Target]) -> None:
    """Runs until libFuzzer's options end it: -runs=1000000, -max_total_time=60, ... ; any failure ends it too."""
    chosen = list(targets.values())

    def one(data: bytes) -> None:
        if data:
            chosen[data[0] % len(chosen)].read(data[1:])

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if not data or rng.random() < 0.2:
            return atheris.Mutate(data, longest)
        return (data[:1] + chosen[data[0] % len(chosen)].mutated(data[1:], rng))[:longest]

    with tempfile.TemporaryDirectory(prefix="glm-export-fuzz-") as corpus:
        for number, target in enumerate(chosen):
            for i, seed in enumerate(target.seeds()):
                (Path(corpus) / f"{number}-{i}").write_bytes(bytes([number]) + seed)
        failed = f"-artifact_prefix={tempfile.gettempdir()}/glm-export-fuzz-"  # the input that fails is kept there
        atheris.Setup([sys.argv[0], failed, *sys.argv[1:], corpus], one, custom_mutator=mutated)
        atheris.Fuzz()
