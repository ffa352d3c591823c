"""The expert kernels: every path against the float64 loop, and the host's part of them."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cuda_tools
import pytest
import torch
from experts_bound import choose, exact, random
from torch import Tensor

from glm_export.plugins.cuda import api
from glm_export.plugins.cuda.api import CudaError
from glm_export.plugins.fp8 import quantize_rows

if TYPE_CHECKING:
    from conftest import ExpectClose

FP8 = torch.float8_e4m3fn
PATHS = ("decode", "mma", "wgmma")
KINDS = {
    # dtype of hidden, whether the weights are E4M3
    "bf16": (torch.bfloat16, False),
    "f16": (torch.float16, False),
    "fp8_bf16": (torch.bfloat16, True),
    "fp8_f16": (torch.float16, True),
    "fp8_f32": (torch.float32, True),
}
REGIMES = {
    # tokens, experts, chosen per token, hidden size, width, experts that may be chosen
    "one_token": (1, 8, 2, 32, 16, ()),
    "one_expert": (3, 1, 1, 32, 16, ()),
    "every_expert": (5, 4, 4, 48, 32, ()),
    "nobody_chose_most": (6, 40, 2, 32, 16, (0, 39)),
    "rows_longer_than_a_step": (9, 4, 2, 272, 144, ()),
    "columns_of_several_tiles": (4, 2, 1, 272, 304, ()),
    "decode_tile_full": (16, 2, 2, 32, 16, ()),
    "decode_tile_and_tail": (27, 3, 1, 64, 48, (2,)),
    "tile_full": (128, 2, 1, 16, 16, (1,)),
    "tile_and_tail": (150, 3, 2, 48, 16, ()),
    "several_steps_of_the_sort": (270, 5, 2, 16, 16, ()),
    "half_a_tile_and_a_bit": (70, 3, 1, 32, 16, (1,)),
}

evaluators = pytest.mark.parametrize("evaluator", cuda_tools.EVALUATORS)
paths = pytest.mark.parametrize("path", PATHS)


@dataclass(frozen=True, slots=True)
class Case:
    """An op's inputs."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None

    @property
    def fp8(self) -> bool:
        return self.gate_up_scale is not None

    def run(self, evaluator: str, path: str, *, workspace: int = 255, **device: int) -> Tensor:
        """`workspace` is every byte that stands in the workspace at first."""
        if evaluator == "cuda_gpu":
            cuda_tools.machine(evaluator)
            if path == "wgmma" and torch.cuda.get_device_capability() != (9, 0):
                pytest.skip("only SM90 has this path")
        inputs = [self.hidden, self.ids, self.weights, self.gate_up, self.gate_up_scale, self.down, self.down_scale]
        name = "FP8MoEExperts" if self.fp8 else "MoEExperts"
        given = tuple(x for x in inputs if x is not None)
        attributes = {"path": path, "workspace": workspace}
        (out,) = cuda_tools.run(evaluator, name, given, 1, attributes, **{"multiprocessors": 3} | device)
        return out

    def check(self, expect_close: ExpectClose, evaluator: str, path: str) -> None:
        got = self.run(evaluator, path)
        assert got.dtype == self.hidden.dtype
        gate_up, down = self.gate_up.double(), self.down.double()
        if self.gate_up_scale is not None and self.down_scale is not None:
            gate_up, down = gate_up * self.gate_up_scale[..., None], down * self.down_scale[..., None]
        short_sums = self.fp8 and evaluator == "cuda_gpu" and path != "decode"
        want = exact(self.hidden, self.ids, self.weights, gate_up, down, fp8=self.fp8, short_sums=short_sums)
        expect_close(got, want.value, want.error)


def case(regime: str, kind: str = "bf16") -> Case:
    T, E, K, D, F, among = REGIMES[regime]
    dtype, fp8 = KINDS[kind]
    hidden = random(T, D, seed=1).to(dtype)
    hidden[-1] *= 30  # a scale of its own per token
    ids, weights = choose(T, E, K, among=among)
    if not fp8:
        gate_up, down = random(E, 2 * F, D, seed=2) / D**0.5, random(E, D, F, seed=3) / F**0.5
        return Case(hidden, ids, weights, gate_up.to(dtype), None, down.to(dtype), None)
    gate_up_scale = (random(E, 2 * F, seed=4).abs() + 0.1) / 100 / D**0.5
    down_scale = (random(E, D, seed=5).abs() + 0.1) / 100 / F**0.5
    gate_up, down = ((random(E, *s, seed=seed) * 100).to(FP8) for seed, s in ((2, (2 * F, D)), (3, (D, F))))
    return Case(hidden, ids, weights, gate_up, gate_up_scale, down, down_scale)


@evaluators
@paths
@pytest.mark.parametrize("regime", REGIMES)
def test_float64_loop(expect_close: ExpectClose, evaluator: str, path: str, regime: str) -> None:
    case(regime, "fp8_bf16").check(expect_close, evaluator, path)


@evaluators
@paths
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8_bf16"])
@pytest.mark.parametrize("regime", ["rows_longer_than_a_step", "decode_tile_and_tail"])
def test_other_types(expect_close: ExpectClose, evaluator: str, path: str, kind: str, regime: str) -> None:
    case(regime, kind).check(expect_close, evaluator, path)


@pytest.mark.parametrize("kind", ["bf16", "fp8_bf16"])
@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
def test_what_the_device_suggests(expect_close: ExpectClose, sm: int, kind: str) -> None:
    # Shared memory differs, and with it the tokens of a pass and the chunks in flight.
    x = case("rows_longer_than_a_step", kind)
    auto = x.run("cuda_emulator", "auto", sm=sm, multiprocessors=2)
    expect_close(auto, x.run("cuda_emulator", "decode"), 0)


@evaluators
@paths
def test_same_result_again(evaluator: str, path: str) -> None:
    # Whatever the order of threads and blocks, and how many blocks share the work.
    x = case("every_expert", "fp8_f16")
    first = x.run(evaluator, path)
    for seed, multiprocessors in ((2, 1), (3, 7), (4, 132)):
        again = x.run(evaluator, path, seed=seed, multiprocessors=multiprocessors)
        assert torch.equal(again.view(torch.int16), first.view(torch.int16))


@evaluators
@paths
def test_an_expert_that_does_not_exist(evaluator: str, path: str) -> None:
    x = case("every_expert", "fp8_bf16")
    want = x.run(evaluator, path)
    x.ids[1, 2], x.ids[3, 0] = 4, -1
    got = x.run(evaluator, path, workspace=0)
    assert got[[1, 3]].isnan().all()
    assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])


@evaluators
@paths
@pytest.mark.parametrize("kind", ["bf16", "fp8_bf16"])
def test_nan_and_infinity_stay_in_their_token(evaluator: str, path: str, kind: str) -> None:
    x = case("decode_tile_and_tail", kind)
    want = x.run(evaluator, path)
    x.hidden[3, 5], x.hidden[20, 0] = float("nan"), float("inf")
    got = x.run(evaluator, path)
    assert got[3].isnan().all()
    assert not got[20].isfinite().any()
    others = [t for t in range(len(got)) if t not in (3, 20)]
    assert torch.equal(got[others], want[others])


@evaluators
@paths
def test_zero_tokens_give_zero(evaluator: str, path: str) -> None:
    x = case("one_expert", "fp8_f16")
    assert not replace(x, hidden=torch.zeros_like(x.hidden)).run(evaluator, path).any()


@evaluators
@pytest.mark.parametrize("kind", ["fp8_bf16", "fp8_f16", "fp8_f32"])
@pytest.mark.parametrize("width", [16, 272, 1408])
def test_tokens_are_quantized_exactly(evaluator: str, kind: str, width: int) -> None:
    where = cuda_tools.machine(evaluator)
    dtype = KINDS[kind][0]
    hidden = (random(7, width, seed=1) * torch.tensor([1e-3, 1, 30, 1e4, 0, 1, 1])[:, None]).to(dtype)
    hidden[5] = torch.finfo(dtype).smallest_normal / 2
    hidden[6, 3] = torch.finfo(dtype).max
    values, scales = quantize_rows(hidden)
    with where.memory(multiprocessors=1) as memory:
        sizes: dict[str, Any] = {"T": 7, "D": width, "F": 16, "E": 1, "K": 1}
        sizes |= {"hidden_type": str(dtype).removeprefix("torch."), "weight_type": "float8_e4m3fn"}
        size = where.kernels.moe_experts_workspace(**sizes)
        workspace = memory.empty(size, dtype=torch.uint8, alignment=256)
        ones = memory.place(torch.ones(max(32, width)))
        where.kernels.moe_experts(
            hidden=memory.place(hidden, alignment=16),
            expert_ids=memory.place(torch.zeros(7, 1, dtype=torch.int32)),
            expert_weights=memory.place(torch.ones(7, 1)),
            gate_up=memory.place(torch.zeros(32, width, dtype=torch.uint8), alignment=16),
            gate_up_scale=ones,
            down=memory.place(torch.zeros(width, 16, dtype=torch.uint8), alignment=16),
            down_scale=ones,
            out=memory.empty(7, width, dtype=dtype, alignment=16),
            workspace=workspace,
            workspace_bytes=size,
            **sizes,
            stream=memory.stream,
        )
        written = memory.get(workspace).numpy().tobytes()
    assert values.view(torch.uint8).numpy().tobytes() in written
    assert scales.numpy().tobytes() in written


SIZES: dict[str, Any] = {"T": 2, "D": 32, "F": 16, "E": 4, "K": 2}
SIZES |= {"hidden_type": "bfloat16", "weight_type": "float8_e4m3fn"}
ADDRESS = 4096  # that nobody reads, aligned to 256 bytes
ARGUMENTS = {
    **dict.fromkeys(["hidden", "expert_ids", "expert_weights", "gate_up", "gate_up_scale", "down"], ADDRESS),
    **{"down_scale": ADDRESS, "out": ADDRESS, "workspace": ADDRESS, "workspace_bytes": 1 << 20, "stream": 0},
}
WRONG_SIZES: list[tuple[dict[str, Any], str]] = [
    ({"T": -1}, "T is out of range"),
    ({"D": 0}, "D is out of range"),
    ({"D": 40}, "D is not supported"),
    ({"F": 24}, "F is not supported"),
    ({"F": 1 << 17}, "F is out of range"),
    ({"E": 0}, "E is out of range"),
    ({"E": 513}, "E is out of range"),
    ({"K": 0}, "K is out of range"),
    ({"K": 5}, "K is out of range"),
    ({"E": 64, "K": 33}, "K is out of range"),
    ({"hidden_type": "float8_e4m3fn"}, "hidden_type is not supported"),
    ({"weight_type": "float16"}, "weight_type is not supported"),
    ({"hidden_type": "float32", "weight_type": "float32"}, "weight_type is not supported"),
]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        *WRONG_SIZES,
        ({"hidden": 0}, "hidden is null"),
        ({"hidden": ADDRESS + 8}, "hidden is not aligned"),
        ({"expert_ids": ADDRESS + 2}, "expert_ids is not aligned"),
        ({"expert_weights": 0}, "expert_weights is null"),
        ({"gate_up": ADDRESS + 4}, "gate_up is not aligned"),
        ({"gate_up_scale": None}, "gate_up_scale is null"),
        ({"down": 0}, "down is null"),
        ({"down_scale": None}, "down_scale is null"),
        ({"weight_type": "bfloat16"}, "gate_up_scale has to be null"),
        ({"weight_type": "bfloat16", "gate_up_scale": None}, "down_scale has to be null"),
        ({"out": ADDRESS + 4}, "out is not aligned"),
        ({"workspace": ADDRESS + 128}, "workspace is not aligned"),
        ({"workspace_bytes": 1000}, "workspace_bytes is too small"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CudaError, match=f"^glm_cuda_moe_experts: {sentence}$"):
        cuda_tools.emulator().kernels.moe_experts(**SIZES | ARGUMENTS | wrong)


@pytest.mark.parametrize(("wrong", "sentence"), WRONG_SIZES)
def test_no_workspace_for_wrong_sizes(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CudaError, match=f"^glm_cuda_moe_experts_workspace: {sentence}$"):
        cuda_tools.emulator().kernels.moe_experts_workspace(**SIZES | wrong)


def test_paths_are_those_of_the_header() -> None:
    header = (cuda_tools.REPOSITORY / "plugins/cuda/launch.h").read_text()
    found = {name.lower(): int(number) for name, number in re.findall(r"GLM_CUDA_PATH_(\w+) = (\d+)", header)}
    assert found == api.EXPERT_PATHS


def test_path_of_another_device() -> None:
    emulator = cuda_tools.emulator()
    with emulator.memory(sm=89), pytest.raises(CudaError, match="path is not supported"):
        emulator.kernels.moe_experts(**SIZES | ARGUMENTS, path="wgmma")


def test_no_tokens_is_no_work() -> None:
    cuda_tools.emulator().kernels.moe_experts(**SIZES | dict.fromkeys(ARGUMENTS, 0) | {"T": 0})


@pytest.mark.parametrize("kind", KINDS)
def test_workspace_grows_with_tokens(kind: str) -> None:
    dtype, fp8 = KINDS[kind]
    name = str(dtype).removeprefix("torch.")
    kinds = {"hidden_type": name, "weight_type": "float8_e4m3fn" if fp8 else name}
    workspace = cuda_tools.emulator().kernels.moe_experts_workspace
    sizes = [workspace(T=T, D=4096, F=1408, E=128, K=8, **kinds) for T in (0, 1, 2, 63, 64, 65, 128, 129, 1000, 8192)]
    assert sizes == sorted(sizes)
    assert all(size % 256 == 0 for size in sizes)
    # What the assignments need: y in float32, h once or twice, their order.
    need = 65536 * (4096 * 4 + 1408 * (dtype.itemsize + fp8) + 4)
    assert need < sizes[-1] < need * 1.05


@dataclass(frozen=True, slots=True)
class Product:
    tiles: int
    blocks: int
    shared_bytes: int
    tokens: int
    row_stride: int
    splits: int
    depth: int


MODELS = {"GLM-4.5-Air": (4096, 1408, 128, 8), "GLM-4.7": (5120, 1536, 160, 8)}
DEVICES = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}
"""SMs of an A100, RTX 4090, H200, B200, RTX 5090."""
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a block can have, by the CUDA C++ Programming Guide's table of technical specifications."""


def plan(sm: int, T: int, model: str, weights: str, path: str = "auto") -> tuple[str, int, Product, Product]:
    """Path, tokens of a run, and the two products."""
    library = cuda_tools.emulated_library(cuda_tools.REPOSITORY / "tests/plugins/experts_plan.cu")
    library.glm_cuda_emulator_device(sm, DEVICES[sm], SHARED[sm] * 1024)
    found = (ctypes.c_int64 * 20)()
    types = (api.TYPES["bfloat16"], api.TYPES[weights])
    assert library.experts_plan(T, *MODELS[model], *types, api.EXPERT_PATHS[path], found)
    names = {number: name for name, number in api.EXPERT_PATHS.items()}
    return names[found[0]], found[1], Product(*found[2:9]), Product(*found[9:16])


models = pytest.mark.parametrize("model", MODELS)
devices = pytest.mark.parametrize("sm", DEVICES)
weights = pytest.mark.parametrize("weights", ["bfloat16", "float8_e4m3fn"])


@models
@devices
@weights
@pytest.mark.parametrize("T", [1, 2, 8, 31, 64, 65, 256, 2048, 8192])
def test_plan(model: str, sm: int, weights: str, T: int) -> None:
    D, F, E, K = MODELS[model]
    path, run_tokens, gate_up, down = plan(sm, T, model, weights)
    decode = T <= 64 or T * K <= 8 * E
    assert path == ("decode" if decode else "wgmma" if sm == 90 else "mma")
    for product, columns, length in ((gate_up, 2 * F, D), (down, D, F)):
        assert product.shared_bytes <= SHARED[sm] * 1024
        assert 0 < product.blocks <= DEVICES[sm]
        # A tile's weight rows: 16 for every team of warps, or 256 or 128.
        rows = 16 * 16 // product.splits if decode else 256 if sm == 90 else 128
        assert product.tiles == -(-columns // rows)
        if not decode:
            assert run_tokens == 128
            continue
        row_bytes = length * (1 if weights == "float8_e4m3fn" else 2)
        assert min(run_tokens, T) == run_tokens == product.tokens
        assert product.row_stride >= row_bytes
        assert product.row_stride % 128 == 64  # what keeps the lanes' reads apart
        chunks = -(-row_bytes // 64)
        assert chunks / (-(-chunks // product.splits) * product.splits) >= 0.9 or product.splits == 1
        assert product.depth in (2, 4, 8)


@models
@weights
@pytest.mark.parametrize("sm", [90, 100])
def test_decode_keeps_memory_busy(model: str, weights: str, sm: int) -> None:
    # 4.8 TB/s (8 on SM100) times about a microsecond of latency, over 132 (148) SMs: 36 (54) KB on their way to each.
    # 8 tokens of an expert, and in practice 16, share one pass over its weights.
    for T in (1, 8, 32, 64):
        path, run_tokens, *products = plan(sm, T, model, weights)
        assert path == "decode"
        assert run_tokens == min(T, 16) or run_tokens == 8
        for product in products:
            assert 16 * 1024 * (product.depth - 1) >= 36_000
            assert product.blocks == DEVICES[sm]


@models
@weights
@pytest.mark.parametrize("sm", [89, 120])
def test_decode_fits_small_shared_memory(model: str, weights: str, sm: int) -> None:
    path, run_tokens, *products = plan(sm, 64, model, weights)
    assert path == "decode"
    assert run_tokens >= 4
    assert all(product.depth >= 2 for product in products)
