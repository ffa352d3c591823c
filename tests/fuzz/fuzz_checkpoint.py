"""Fuzzes what reads a checkpoint before its weights: shard headers, index, config.json, quantization.

python tests/fuzz/fuzz_checkpoint.py -runs=1000000
"""

import atheris
import torch  # noqa: F401  # before any import is instrumented: what is in glm_export imports it

with atheris.instrument_imports(include=["glm_export"]):
    from targets import CHECKPOINT

from fuzzing import fuzz

if __name__ == "__main__":
    fuzz(CHECKPOINT)
