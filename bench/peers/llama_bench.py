"""A GGUF file in ik_llama.cpp: `python bench/peers/llama_bench.py MODEL.gguf --binary LLAMA_BENCH [--repack]`.

Its llama-bench follows the same protocol with random tokens of its own, so there are no greedy choices to compare.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from protocol import arguments


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--binary", required=True, help="its llama-bench")
    parser.add_argument("--repack", action="store_true", help="repack the weights when they are loaded")
    options = parser.parse_args()
    tests = ["-p", str(options.prompt), "-n", "0", "-gp", f"{options.context},{options.steps}"]
    # Without its flash attention, which takes minutes to compile: attention is 3% of this prefill.
    form = ["-t", str(options.threads), "-r", str(options.repeats), "-rtr", str(int(options.repack)), "-fa", "0"]
    command = [options.binary, "-m", options.model, *tests, *form, "-o", "json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    results: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[") :])
    rates = {bool(result["n_gen"]): result["samples_ts"] for result in results}
    print(json.dumps({"decode": rates[True], "prefill": rates[False]}))


if __name__ == "__main__":
    main()
