"""The expert kernels on one GPU, beside Triton, PyTorch and what memory and tensor cores give in the same run.

    python bench/cuda_experts.py [--model GLM-4.5-Air] [--weights fp8|bf16] [--tokens 1 8 ...] [--rounds 11]

One line per number of tokens. Decode: TB/s over the weights of the experts that were hit, and its share of what copying
reaches; prefill: TFLOP/s, and its share of torch's FP8 (or bf16) matrix product of 8192 x 8192 x 8192. Every call is a
CUDA graph over several sets of weights in turn, so that none is left in the second-level cache. Results are compared
first. `triton` is one kernel for both products, with weights in place, over tokens sorted by PyTorch outside the timing
(so it leaves that out); `pytorch` is torch._grouped_mm on bf16 (16-bit weights only).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from cuda_timing import describe_device, microseconds
from torch import Tensor

from glm_export.plugins.cuda.api import CudaKernels
from glm_export.plugins.fp8 import quantize_rows

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A released model's experts."""

    D: int
    F: int
    E: int
    K: int


MODELS = {
    "GLM-4.5-Air": Model(D=4096, F=1408, E=128, K=8),
    "GLM-4.7": Model(D=5120, F=1536, E=160, K=8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One layer's, on the device."""

    gate_up: Tensor
    """[E, 2F, D]."""
    gate_up_scale: Tensor | None
    """[E, 2F]."""
    down: Tensor
    """[E, D, F]."""
    down_scale: Tensor | None
    """[E, D]."""


def random_weights(model: Model, *, fp8: bool) -> Weights:
    def random(*shape: int) -> tuple[Tensor, Tensor | None]:
        x = torch.randn(shape, dtype=torch.bfloat16, device="cuda") / shape[-1] ** 0.5
        if not fp8:
            return x, None
        experts = [quantize_rows(expert) for expert in x]  # one after the other: float32 copies are large
        return torch.stack([values for values, _ in experts]), torch.stack([scale for _, scale in experts])

    gate_up, gate_up_scale = random(model.E, 2 * model.F, model.D)
    down, down_scale = random(model.E, model.D, model.F)
    return Weights(gate_up=gate_up, gate_up_scale=gate_up_scale, down=down, down_scale=down_scale)


class Ours:
    """The kernels, with a workspace of their own."""

    def __init__(self, kernels: CudaKernels, model: Model, hidden: Tensor, weights: Weights, path: str = "auto"):
        sizes: dict[str, Any] = {"T": len(hidden), "D": model.D, "F": model.F, "E": model.E, "K": model.K}
        sizes |= {name: str(x.dtype).removeprefix("torch.") for name, x in (("hidden_type", hidden),)}
        sizes |= {"weight_type": str(weights.gate_up.dtype).removeprefix("torch.")}
        self._kernels, self._sizes, self._path = kernels, sizes, path
        size = kernels.moe_experts_workspace(**sizes)
        self._workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._out = torch.empty_like(hidden)

    def __call__(self, hidden: Tensor, ids: Tensor, expert_weights: Tensor, weights: Weights) -> Tensor:
        self._kernels.moe_experts(
            hidden=hidden.data_ptr(),
            expert_ids=ids.data_ptr(),
            expert_weights=expert_weights.data_ptr(),
            gate_up=weights.gate_up.data_ptr(),
            gate_up_scale=None if weights.gate_up_scale is None else weights.gate_up_scale.data_ptr(),
            down=weights.down.data_ptr(),
            down_scale=None if weights.down_scale is None else weights.down_scale.data_ptr(),
            out=self._out.data_ptr(),
            workspace=self._workspace.data_ptr(),
            workspace_bytes=self._workspace.numel(),
            **self._sizes,
            path=self._path,
            stream=torch.cuda.current_stream().cuda_stream,
        )
        return self._out


@triton.jit
def _triton_product(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    rows,
    tile_expert,
    width,
    columns,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # out[m] = x[rows[m]] @ weight[expert]^T for a tile of sorted assignments; rows of -1 are padding.
    tile, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(rows + m)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    x_at = x + row[:, None].to(tl.int64) * width + k[None, :]
    w_at = weight + expert * columns * width + n[None, :].to(tl.int64) * width + k[:, None]
    for first in range(0, width, BLOCK_K):
        a = tl.load(x_at + first, mask=(row[:, None] >= 0) & (first + k[None, :] < width), other=0.0)
        b = tl.load(w_at + first, mask=(n[None, :] < columns) & (first + k[:, None] < width), other=0.0)
        sums = tl.dot(a, b, sums)
    if FP8:
        sums *= tl.load(x_scale + row, mask=row >= 0, other=0.0)[:, None]
        sums *= tl.load(weight_scale + expert * columns + n, mask=n < columns, other=0.0)[None, :]
    tl.store(
        out + m[:, None].to(tl.int64) * columns + n[None, :], sums, mask=(row[:, None] >= 0) & (n[None, :] < columns)
    )


@triton.jit
def _triton_quantize(x, values, scales, width, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    v = tl.load(x + row * width + i, mask=i < width, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(v), axis=0) / 448.0
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scales + row, scale)
    tl.store(values + row * width + i, (v / scale).to(tl.float8e4nv), mask=i < width)


@triton.jit
def _triton_silu_mul(gate_up, h, F, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * F + i, mask=i < F, other=0.0)
    up = tl.load(gate_up + row * 2 * F + F + i, mask=i < F, other=0.0)
    tl.store(h + row * F + i, gate * tl.sigmoid(gate) * up, mask=i < F)


@triton.jit
def _triton_combine(y, place, weights, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        at = tl.load(place + t * K + k).to(tl.int64)
        sums += tl.load(weights + t * K + k) * tl.load(y + at * D + d, mask=d < D, other=0.0)
    tl.store(out + t * D + d, sums, mask=d < D)


class Triton:
    """The common fused-MoE scheme: assignments sorted and padded to tiles, one grouped product kernel used twice."""

    def __init__(self, model: Model, hidden: Tensor, ids: Tensor):
        T = len(hidden)
        self._model, self._block_m = model, 16 if T * model.K <= 16 * model.E else 64 if T <= 1024 else 128
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=model.E)
        tiles = (counts + self._block_m - 1) // self._block_m
        total = int(tiles.sum()) * self._block_m
        starts = (tiles.cumsum(0) - tiles) * self._block_m
        sorted_ids = ids.flatten()[order].long()
        place = starts[sorted_ids] + torch.arange(T * model.K, device="cuda") - (counts.cumsum(0) - counts)[sorted_ids]
        self._tile_expert = torch.arange(model.E, device="cuda").repeat_interleave(tiles).int()
        self._tokens = torch.full((total,), -1, dtype=torch.int32, device="cuda")
        self._tokens[place] = (order // model.K).int()
        self._own = torch.where(self._tokens >= 0, torch.arange(total, device="cuda"), -1).int()
        self._place = torch.empty(T * model.K, dtype=torch.int32, device="cuda")
        self._place[order] = place.int()
        self._gate_up = torch.zeros(total, 2 * model.F, device="cuda")
        self._h = torch.zeros(total, model.F, dtype=hidden.dtype, device="cuda")
        self._y = torch.zeros(total, model.D, device="cuda")
        self._out = torch.empty_like(hidden)

    def __call__(self, hidden: Tensor, ids: Tensor, expert_weights: Tensor, weights: Weights) -> Tensor:
        m = self._model
        gate_up = self._product(hidden, self._tokens, weights.gate_up, weights.gate_up_scale, self._gate_up)
        _triton_silu_mul[(len(self._h), triton.cdiv(m.F, 1024))](gate_up, self._h, m.F, BLOCK=1024)
        y = self._product(self._h, self._own, weights.down, weights.down_scale, self._y)
        grid = (len(hidden), triton.cdiv(m.D, 1024))
        _triton_combine[grid](y, self._place, expert_weights, self._out, m.D, K=m.K, BLOCK=1024)
        return self._out

    def _product(self, x: Tensor, rows: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
        x_scale = None
        if scale is not None:
            values, x_scale = torch.empty_like(x, dtype=weight.dtype), torch.empty(len(x), device="cuda")
            block = triton.next_power_of_2(x.shape[1])
            _triton_quantize[(len(x),)](x, values, x_scale, x.shape[1], BLOCK=block, num_warps=8)
            x = values
        small = self._block_m == 16
        block = {"BLOCK_M": self._block_m, "BLOCK_N": 64 if small else 128, "BLOCK_K": 256 if small else 128}
        if scale is None:
            block["BLOCK_K"] //= 2
        _, columns, width = weight.shape
        grid = (len(rows) // self._block_m, triton.cdiv(columns, block["BLOCK_N"]))
        options = {"num_warps": 4 if small else 8, "num_stages": 4 if small else 3}
        _triton_product[grid](
            x,
            x_scale,
            weight,
            scale,
            out,
            rows,
            self._tile_expert,
            width,
            columns,
            FP8=scale is not None,
            **block,
            **options,
        )
        return out


def pytorch_bf16(hidden: Tensor, ids: Tensor, expert_weights: Tensor, weights: Weights) -> Tensor:
    """torch._grouped_mm over sorted assignments, sorting included."""
    K = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    experts = torch.arange(len(weights.gate_up), device="cuda", dtype=ids.dtype)
    ends = (ids.flatten()[None, :] <= experts[:, None]).sum(-1).int()
    both = torch._grouped_mm(hidden[order // K], weights.gate_up.transpose(-2, -1), ends)
    gate, up = both.chunk(2, dim=-1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, weights.down.transpose(-2, -1), ends)
    sums = torch.empty(len(order), y.shape[1], device="cuda")
    sums[order] = y.float() * expert_weights.flatten()[order, None]
    return sums.view(len(hidden), K, -1).sum(1).to(hidden.dtype)


def copy_rate() -> float:
    """Bytes per second that copying 2 GiB reads and writes."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    times = microseconds({"copy": lambda: y.copy_(x)}, calls_per_graph=4)["copy"]
    return 2 * x.numel() / statistics.median(times) * 1e6


def matrix_rate(*, fp8: bool) -> float:
    """FLOP per second of torch's own product of 8192 x 8192 x 8192."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    if not fp8:
        call: Callable[[], object] = lambda: a @ b.T  # noqa: E731
    else:
        (qa, sa), (qb, sb) = quantize_rows(a), quantize_rows(b)
        scales = {"scale_a": sa[:, None], "scale_b": sb[None, :], "out_dtype": torch.bfloat16}
        call = lambda: torch._scaled_mm(qa, qb.T, **scales)  # noqa: E731
    return 2 * n**3 / statistics.median(microseconds({"product": call}, calls_per_graph=4)["product"]) * 1e6


def measure(model: Model, kernels: CudaKernels, layers: list[Weights], T: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds per layer of everyone who can."""
    hidden = torch.randn(T, model.D, dtype=torch.bfloat16, device="cuda")
    ids = torch.rand(T, model.E, device="cuda").topk(model.K).indices.int()
    expert_weights = torch.rand(T, model.K, device="cuda")
    runs: dict[str, Callable[..., Tensor]] = {"ours": Ours(kernels, model, hidden, layers[0])}
    if T >= 128:
        runs["ours (mma)"] = Ours(kernels, model, hidden, layers[0], "mma")
    runs["triton"] = Triton(model, hidden, ids)
    if layers[0].gate_up_scale is None:
        runs["pytorch"] = pytorch_bf16
    want = runs["triton"](hidden, ids, expert_weights, layers[0]).float()
    for name, run in runs.items():
        got = run(hidden, ids, expert_weights, layers[0]).float()
        # All of them round h, and FP8 rows of it, from sums in other orders: few rows may fall to the other side.
        distance = float((got - want).norm() / want.norm())
        assert distance < 1e-2, f"{name} at {T} tokens is {distance:.1e} away from triton"

    def over_layers(run: Callable[..., Tensor]) -> Callable[[], None]:
        def call() -> None:
            for layer in layers:
                run(hidden, ids, expert_weights, layer)

        return call

    found = microseconds({name: over_layers(run) for name, run in runs.items()}, calls_per_graph=2, rounds=rounds)
    experts_hit = len(ids.unique())
    return {name: [t / len(layers) for t in times] for name, times in found.items()} | {"hit": [experts_hit]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="GLM-4.5-Air")
    parser.add_argument("--weights", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--layers", type=int, default=3, help="sets of weights that take turns")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()

    model, fp8 = MODELS[options.model], options.weights == "fp8"
    print(describe_device())
    bandwidth, compute = copy_rate(), matrix_rate(fp8=fp8)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, torch {options.weights} product {compute / 1e12:.0f} TFLOP/s")
    layers = [random_weights(model, fp8=fp8) for _ in range(options.layers)]
    expert_bytes = 3 * model.D * model.F * layers[0].gate_up.element_size()
    for T in options.tokens:
        found = measure(model, CudaKernels(), layers, T, options.rounds)
        hit = int(found.pop("hit")[0])
        cells = []
        for name, times in found.items():
            seconds = statistics.median(times) / 1e6
            rate, flops = hit * expert_bytes / seconds, 6 * T * model.K * model.D * model.F / seconds
            share = (
                f"{rate / 1e12:.2f} TB/s {rate / bandwidth:4.0%}"
                if T <= 128
                else f"{flops / 1e12:4.0f} TFLOP/s {flops / compute:4.0%}"
            )
            cells.append(f"{name} {seconds * 1e6:8.1f} us ({min(times):.1f}-{max(times):.1f}) {share}")
        print(f"{options.model} {options.weights} {T:5d} tokens, {hit:3d} experts: {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
