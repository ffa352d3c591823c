"""How an FP8 checkpoint is served by engines that split it over several GPUs: one launch line for each of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from glm_export.exporter.gpus import GPUS, gpus_needed, tensor_parallel_size

ENGINES = {"compressed-tensors": ("vllm", "sglang", "trtllm-serve"), "modelopt": ("trtllm-serve",)}
"""Format -> who reads it for a mixture of experts. vLLM and SGLang take ModelOpt's experts only per tensor."""


def splits(weight_bytes: int, kv_heads: int) -> dict[int, list[str]]:
    """Tensor-parallel size -> the kinds of GPUs of which so many hold the weights, with a tenth of memory to spare."""
    found: dict[int, list[str]] = {}
    for gpu in GPUS:
        if size := tensor_parallel_size(gpus_needed(weight_bytes, gpu), kv_heads):
            found.setdefault(size, []).append(gpu.name)
    return dict(sorted(found.items()))


def launch_lines(directory: Path, format: str, tensor_parallel: int) -> Iterator[str]:
    """The commands that serve a checkpoint on so many GPUs, the experts of each layer spread over all of them."""
    place = shlex.quote(str(directory))
    parallel = tensor_parallel > 1
    lines = {
        "vllm": f"vllm serve {place} --tensor-parallel-size {tensor_parallel}" + " --enable-expert-parallel" * parallel,
        "sglang": f"python -m sglang.launch_server --model-path {place} --tp-size {tensor_parallel}"
        + f" --ep-size {tensor_parallel}" * parallel,
        "trtllm-serve": f"trtllm-serve {place} --backend pytorch --tp_size {tensor_parallel}"
        + f" --ep_size {tensor_parallel}" * parallel,
    }
    yield from (lines[engine] for engine in ENGINES[format])
