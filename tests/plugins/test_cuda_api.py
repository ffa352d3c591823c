"""launch.h and what Python knows of it; arguments that no kernel takes."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from typing import Any

import cuda_tools
import pytest
import torch

from glm_export.plugins.cuda import api
from glm_export.plugins.cuda.api import CudaError, CudaKernels
from glm_export.plugins.library import cuda_library

HEADER = (cuda_tools.REPOSITORY / "plugins/cuda/launch.h").read_text()
INTEGERS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}
C_TYPES = INTEGERS | {"float": ctypes.c_float, "const char*": ctypes.c_char_p}
A, B = 4096, 4100  # addresses that nobody reads, aligned to 256 and to 4 bytes


def test_signatures_are_those_of_the_header() -> None:
    code = re.sub(r"//.*", "", HEADER)
    found = {}
    for result, name, arguments in re.findall(r"GLM_CUDA_API ([\w ]+?\*?) ?(glm_\w+)\((.*?)\);", code, re.DOTALL):
        types = [" ".join(x.split()[:-1]) for x in arguments.split(",") if x.strip() != "void"]
        found[name] = tuple(
            C_TYPES[t] if t in C_TYPES else ctypes.c_void_p if t.endswith("*") else pytest.fail(t)
            for t in (result, *types)
        )
    assert found == api.SIGNATURES


def test_numbers_are_those_of_the_header() -> None:
    assert re.findall(r"define GLM_CUDA_ABI (\d+)", HEADER) == [str(api.ABI)]
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "E4M3": "float8_e4m3fn"}
    found = re.findall(r"GLM_CUDA_(F32|F16|BF16|E4M3) = (\d+)", HEADER)
    assert {names[name]: int(number) for name, number in found} == api.TYPES


ROUTER: dict[str, Any] = {
    **{"logits": A, "correction_bias": A, "expert_ids": A, "expert_weights": A, "T": 2, "E": 8},
    **{"top_k": 2, "n_group": 4, "topk_group": 2, "norm_topk_prob": 1, "routed_scaling_factor": 1.0, "stream": 0},
}
WRITE: dict[str, Any] = {
    **{"cache": A, "update": A, "write_index": A, "B": 1, "J": 2, "C": 3, "S": 1, "A": 8},
    **{"update_type": "bfloat16", "stream": 0},
}


@pytest.mark.parametrize(
    ("op", "wrong", "sentence"),
    [
        ("moe_router", {"logits": 0}, "logits is null"),
        ("moe_router", {"correction_bias": 0}, "correction_bias is null"),
        ("moe_router", {"expert_ids": A + 2}, "expert_ids is not aligned"),
        ("moe_router", {"expert_weights": 0}, "expert_weights is null"),
        ("moe_router", {"T": -1}, "T is out of range"),
        ("moe_router", {"E": 0}, "E is out of range"),
        ("moe_router", {"E": 513}, "E is out of range"),
        ("moe_router", {"top_k": 0}, "top_k is out of range"),
        ("moe_router", {"top_k": 9}, "top_k is out of range"),
        ("moe_router", {"E": 64, "top_k": 33}, "top_k is out of range"),
        ("moe_router", {"n_group": 0}, "n_group is out of range"),
        ("moe_router", {"n_group": 3}, "n_group is not supported"),
        ("moe_router", {"E": 64, "n_group": 64}, "n_group is out of range"),
        ("moe_router", {"topk_group": 0}, "topk_group is out of range"),
        ("moe_router", {"topk_group": 5}, "topk_group is out of range"),
        ("moe_router", {"norm_topk_prob": 2}, "norm_topk_prob is out of range"),
        ("fp8_cache_write", {"cache": 0}, "cache is null"),
        ("fp8_cache_write", {"cache": B}, "cache is not aligned"),
        ("fp8_cache_write", {"update": A + 8}, "update is not aligned"),
        ("fp8_cache_write", {"write_index": 0}, "write_index is null"),
        ("fp8_cache_write", {"B": -1}, "B is out of range"),
        ("fp8_cache_write", {"J": 0}, "J is out of range"),
        ("fp8_cache_write", {"B": 40000}, "J is out of range"),
        ("fp8_cache_write", {"C": 0}, "C is out of range"),
        ("fp8_cache_write", {"S": -1}, "S is out of range"),
        ("fp8_cache_write", {"A": 12}, "A is not supported"),
        ("fp8_cache_write", {"A": 520}, "A is out of range"),
        ("fp8_cache_write", {"update_type": "float8_e4m3fn"}, "update_type is not supported"),
    ],
)
def test_wrong_arguments(op: str, wrong: dict[str, Any], sentence: str) -> None:
    right = {"moe_router": ROUTER, "fp8_cache_write": WRITE}[op]
    with pytest.raises(CudaError, match=f"^glm_cuda_{op}: {sentence}$"):
        getattr(cuda_tools.emulator().kernels, op)(**(right | wrong))


@pytest.mark.parametrize(
    ("op", "empty"),
    [("moe_router", {"T": 0, "logits": 0}), ("fp8_cache_write", {"B": 0}), ("fp8_cache_write", {"S": 0, "update": 0})],
)
def test_nothing_to_do(op: str, empty: dict[str, Any]) -> None:
    right = {"moe_router": ROUTER, "fp8_cache_write": WRITE}[op]
    getattr(cuda_tools.emulator().kernels, op)(**(right | empty))


def test_the_workspace_says_what_is_wrong() -> None:
    kernels = cuda_tools.emulator().kernels
    sizes: dict[str, Any] = {"T": 4, "D": 64, "F": 32, "E": 8, "K": 2}
    sizes |= {"hidden_type": "bfloat16", "weight_type": "float8_e4m3fn"}
    assert kernels.moe_experts_workspace(**sizes) % 256 == 0
    with pytest.raises(CudaError, match=r"^glm_cuda_moe_experts_workspace: E is out of range$"):
        kernels.moe_experts_workspace(**(sizes | {"E": 0}))


def test_codes_that_mean_nothing() -> None:
    text = cuda_tools.emulator().library.glm_cuda_error
    text.restype = ctypes.c_char_p
    assert text(0) == b"no error"
    for code in (-1, 1, 15, 16, 31, 1000, 65535):
        assert text(code) == b"an unknown error code", code


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cuda_tools.emulator().library._name
    monkeypatch.setattr(api, "ABI", api.ABI + 1)
    with pytest.raises(OSError, match=f"has interface {api.ABI - 1}, expected {api.ABI}: install glm-export again"):
        CudaKernels(library)
    monkeypatch.setitem(api.SIGNATURES, "glm_cuda_else", (ctypes.c_int32,))
    with pytest.raises(OSError, match="has no glm_cuda_else: install glm-export again"):
        CudaKernels(library)


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "cuda_library", lambda: None)
    with pytest.raises(FileNotFoundError, match="The CUDA kernels were not built"):
        CudaKernels()


@pytest.mark.skipif(cuda_library() is None, reason="libglm_cuda.so is not built: run `make cuda`")
class TestBuiltLibrary:
    """What nvcc made, as far as that can be seen on any machine."""

    def test_it_checks_arguments(self) -> None:
        with pytest.raises(CudaError, match=r"^glm_cuda_moe_router: E is out of range$"):
            CudaKernels().moe_router(**(ROUTER | {"E": 513}))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_it_says_that_there_is_no_device(self) -> None:
        with pytest.raises(CudaError, match=r"^glm_cuda_moe_router: .*(no CUDA-capable device|driver)"):
            CudaKernels().moe_router(**ROUTER)

    def test_it_exports_nothing_else(self) -> None:
        nm = shutil.which("nm")
        if nm is None:
            pytest.skip("no nm")
        command = [nm, "-D", "--defined-only", str(cuda_library())]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert {line.split()[-1] for line in listing.splitlines()} == set(api.SIGNATURES)
