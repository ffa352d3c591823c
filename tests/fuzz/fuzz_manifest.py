"""Fuzzes what reads a bundle's manifest.

python tests/fuzz/fuzz_manifest.py -runs=200000
"""

import atheris

with atheris.instrument_imports(include=["glm_export"]):
    from targets import BUNDLE

from fuzzing import fuzz

if __name__ == "__main__":
    fuzz(BUNDLE)
