"""The MoERouter kernel against a Triton kernel and PyTorch ops, on one GPU, taking turns in one run.

    python bench/cuda_router.py [--calls 50] [--rounds 21]

Prints microseconds per call (medians and ranges over the rounds) of CUDA graphs that hold many calls in a row, so that
a call costs what it adds to a decode step. The results are compared first.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from cuda_timing import describe_device, microseconds, print_row
from torch import Tensor

from glm_export.plugins.cuda.api import CudaKernels
from glm_export.plugins.moe_router.reference import moe_router

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 8192)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A released model's router; all have one group."""

    E: int
    top_k: int
    routed_scaling_factor: float


MODELS = {
    "GLM-4.5-Air": Model(E=128, top_k=8, routed_scaling_factor=1.0),
    "GLM-4.7": Model(E=160, top_k=8, routed_scaling_factor=2.5),
}


@triton.jit
def _triton_kernel(
    logits,
    bias,
    ids,
    weights,
    E,
    scaling,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside = e < E
    score = tl.sigmoid(tl.load(logits + t * E + e, mask=inside, other=0.0))
    choice = tl.where(inside, score + tl.load(bias + e, mask=inside, other=0.0), float("-inf"))
    chosen_ids = tl.zeros([BLOCK_K], tl.int32)
    chosen_scores = tl.zeros([BLOCK_K], tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(choice, axis=0)
        chosen_ids = tl.where(k == i, best, chosen_ids)
        chosen_scores = tl.where(k == i, tl.sum(tl.where(e == best, score, 0.0)), chosen_scores)
        choice = tl.where(e == best, float("-inf"), choice)
    total = tl.sum(chosen_scores) + 1e-20
    tl.store(ids + t * K + k, chosen_ids, mask=k < K)
    tl.store(weights + t * K + k, chosen_scores / total * scaling, mask=k < K)


def run_triton(logits: Tensor, bias: Tensor, ids: Tensor, weights: Tensor, model: Model) -> None:
    T, E = logits.shape
    block = {"BLOCK_E": triton.next_power_of_2(E), "BLOCK_K": triton.next_power_of_2(model.top_k)}
    _triton_kernel[(T,)](
        logits, bias, ids, weights, E, model.routed_scaling_factor, K=model.top_k, **block, num_warps=1
    )


def run_pytorch(logits: Tensor, bias: Tensor, ids: Tensor, weights: Tensor, model: Model) -> None:
    scores = logits.sigmoid()
    chosen = (scores + bias).topk(model.top_k, dim=-1).indices
    found = scores.gather(1, chosen)
    ids.copy_(chosen)
    torch.mul(found, model.routed_scaling_factor / (found.sum(-1, keepdim=True) + 1e-20), out=weights)


def run_ours(kernels: CudaKernels, logits: Tensor, bias: Tensor, ids: Tensor, weights: Tensor, model: Model) -> None:
    kernels.moe_router(
        logits=logits.data_ptr(),
        correction_bias=bias.data_ptr(),
        expert_ids=ids.data_ptr(),
        expert_weights=weights.data_ptr(),
        T=len(logits),
        **asdict(model),
        **GLM,
        stream=torch.cuda.current_stream().cuda_stream,
    )


GLM: dict[str, Any] = {"n_group": 1, "topk_group": 1, "norm_topk_prob": 1}


def compare(name: str, model: Model, arguments: tuple[Tensor, ...]) -> None:
    """A wrong result is not worth timing."""
    logits, bias, ids, weights = (x.cpu() for x in arguments)
    want_ids, want = moe_router(logits, bias, model.top_k, 1, 1, 1, model.routed_scaling_factor)
    same = (ids == want_ids).all(dim=-1)
    assert same.float().mean() >= 0.99, f"{name}: {int((~same).sum())} of {len(same)} tokens chose other experts"
    torch.testing.assert_close(weights[same], want[same], rtol=1e-5, atol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()

    runs = {"ours": partial(run_ours, CudaKernels()), "triton": run_triton, "pytorch": run_pytorch}
    print(describe_device())
    print("microseconds per call, median (range)")
    for label, model in MODELS.items():
        for T in TOKENS:
            logits, bias = torch.randn(T, model.E, device="cuda"), torch.randn(model.E, device="cuda") * 0.1
            calls = {}
            for name, run in runs.items():
                ids = torch.empty(T, model.top_k, dtype=torch.int32, device="cuda")
                weights = torch.empty(T, model.top_k, device="cuda")
                arguments = (logits, bias, ids, weights)
                calls[name] = partial(run, *arguments, model)
                calls[name]()
                compare(name, model, arguments)
            print_row(f"{label}, {T} tokens", microseconds(calls, calls_per_graph=options.calls, rounds=options.rounds))


if __name__ == "__main__":
    main()
