"""The ops as TensorRT plugins: the schemas' dtypes, shapes and fields, and the kernels called with the right arguments.

No GPU is needed: TensorRT-RTX parses and builds without one, and the kernels are a library that writes its calls down.
The C++ plugins need TensorRT's headers, GLM_TENSORRT_INCLUDE_DIR; the parts of them that do not are tested everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_export.plugins.cuda.api import CudaKernels
from glm_export.plugins.ops import OPS, TENSORRT_PLUGINS
from glm_export.plugins.schema import DOMAIN, VERSION
from glm_export.plugins.tensorrt.plugin import creators
from glm_export.plugins.tensorrt.signature import dims

REPOSITORY = Path(__file__).parents[2]
SOURCES = "tests/plugins/tensorrt_plugins"
CUDA_INCLUDE_DIR = "/usr/local/cuda/include"
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I."]


def compile_to(output: Path, *arguments: str) -> Path:
    compiler = shutil.which("c++")
    assert compiler, "the plugins need a C++ compiler"
    subprocess.run([compiler, *FLAGS, *arguments, "-o", str(output)], cwd=REPOSITORY, check=True)
    return output


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels that do nothing, and write down what they were called with."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    return compile_to(folder / "libglm_cuda.so", "-shared", f"{SOURCES}/fake_cuda.cpp")


def journal(library: Path) -> list[str]:
    """What the fake kernels were called with since the last time."""
    take = ctypes.CDLL(str(library)).fake_journal
    take.restype = ctypes.c_char_p
    return take().decode().splitlines()  # type: ignore[no-any-return]


# --- The table in C++ says what the schemas say ------------------------------------------------------------------


def test_op_table_is_the_schemas(tmp_path: Path) -> None:
    program = compile_to(tmp_path / "print_op_table", f"{SOURCES}/print_op_table.cpp")
    table = json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)

    def operands(tensors: Any, inputs: list[str]) -> list[Any]:
        return [
            [t.name, t.shape, sorted(t.dtypes), -1 if t.in_place_of is None else inputs.index(t.in_place_of)]
            for t in tensors
        ]

    def in_table(rows: list[Any]) -> list[Any]:
        return [[name, shape, sorted(dtypes), place] for name, shape, dtypes, place in rows]

    assert (table["domain"], table["version"]) == (DOMAIN, str(VERSION))
    assert list(table["ops"]) == list(TENSORRT_PLUGINS)
    for name, row in table["ops"].items():
        op = OPS[name]
        inputs = [tensor.name for tensor in op.inputs]
        assert in_table(row["inputs"]) == operands(op.inputs, inputs)
        assert in_table(row["outputs"]) == operands(op.outputs, inputs)
        assert row["fields"] == [[a.name, a.type.__name__, a.letter or ""] for a in op.attributes]


@pytest.mark.parametrize("name", TENSORRT_PLUGINS)
def test_schemas_are_what_plugins_can_be(name: str) -> None:
    """The glue reads shapes as letters with a factor of one digit, and finds every output's size in an input."""
    op = OPS[name]
    for tensor in (*op.inputs, *op.outputs):
        assert (
            ",".join(f"{factor if factor > 1 else ''}{letter}" for factor, letter in dims(tensor.shape)) == tensor.shape
        )
        assert not tensor.optional
    plain = {letter for tensor in op.inputs for factor, letter in dims(tensor.shape) if factor == 1}
    plain |= {attribute.letter for attribute in op.attributes if attribute.letter}
    assert {(1, letter) for letter in plain} >= {dim for tensor in op.outputs for dim in dims(tensor.shape)}


# --- A call of a plugin is the right call of a kernel ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """A call, operand i at address (i + 1) * 4096, with a workspace at 2**20 on stream 5."""

    op: str
    dtypes: list[str]
    shapes: list[list[int]]
    fields: dict[str, Any] = field(default_factory=dict)
    in_place: bool = True
    """Whether an output that is to be in place is."""


ROUTER = Given(
    op="MoERouter",
    dtypes=["float32"] * 2,
    shapes=[[3, 16], [16], [3, 4], [3, 4]],
    fields={"top_k": 4, "n_group": 2, "topk_group": 1, "norm_topk_prob": 1, "routed_scaling_factor": 2.5},
)
EXPERTS = Given(
    op="MoEExperts",
    dtypes=["bfloat16", "int32", "float32", "bfloat16", "bfloat16"],
    shapes=[[3, 64], [3, 4], [3, 4], [8, 96, 64], [8, 64, 48], [3, 64]],
)
FP8_EXPERTS = Given(
    op="FP8MoEExperts",
    dtypes=["float16", "int32", "float32", "float8_e4m3fn", "float32", "float8_e4m3fn", "float32"],
    shapes=[[3, 64], [3, 4], [3, 4], [8, 96, 64], [8, 96], [8, 64, 48], [8, 64], [3, 64]],
)
CACHE = Given(
    op="FP8CacheWrite",
    dtypes=["float8_e4m3fn", "bfloat16", "int32"],
    shapes=[[2, 3, 32, 16], [2, 3, 5, 16], [2], [2, 3, 32, 16]],
)

CALLS = [
    (ROUTER, ["moe_router 4096 8192 12288 16384 T3 E16 4 2 1 1 2.5 stream 5"]),
    (
        EXPERTS,
        [
            "workspace T3 D64 F48 E8 K4 types 16 16",
            "moe_experts 4096 8192 12288 16384 0 20480 0 24576 workspace 1048576 768 "
            "T3 D64 F48 E8 K4 types 16 16 path 0 stream 5",
        ],
    ),
    (
        FP8_EXPERTS,
        [
            "workspace T3 D64 F48 E8 K4 types 10 17",
            "moe_experts 4096 8192 12288 16384 20480 24576 28672 32768 workspace 1048576 768 "
            "T3 D64 F48 E8 K4 types 10 17 path 0 stream 5",
        ],
    ),
    (CACHE, ["fp8_cache_write 4096 8192 12288 B2 J3 C32 S5 A16 type 16 stream 5"]),
]


def with_shape(given: Given, index: int, shape: list[int]) -> Given:
    return replace(given, shapes=[shape if i == index else old for i, old in enumerate(given.shapes)])


def with_dtype(given: Given, index: int, dtype: str) -> Given:
    return replace(given, dtypes=[dtype if i == index else old for i, old in enumerate(given.dtypes)])


def with_field(given: Given, name: str, value: Any) -> Given:
    fields = given.fields | {name: value}
    return replace(given, fields={name: value for name, value in fields.items() if value is not None})


WRONG = [
    (with_shape(ROUTER, 0, [3, 1, 16]), "logits"),
    (with_shape(ROUTER, 1, [15]), "correction_bias"),
    (with_shape(ROUTER, 2, [3, 5]), "expert_ids"),  # K is top_k
    (with_shape(ROUTER, 3, [4, 4]), "expert_weights"),
    (with_shape(EXPERTS, 3, [8, 95, 64]), "gate_up"),
    (with_shape(EXPERTS, 4, [8, 64, 47]), "down"),
    (with_shape(FP8_EXPERTS, 7, [3, 65]), "out"),
    (with_shape(CACHE, 3, [2, 3, 33, 16]), "cache_out"),
    (with_dtype(ROUTER, 0, "float16"), "logits"),
    (with_dtype(EXPERTS, 4, "float16"), "down"),
    (with_dtype(FP8_EXPERTS, 0, "int32"), "hidden"),
    (with_dtype(FP8_EXPERTS, 5, "bfloat16"), "down"),
    (with_field(ROUTER, "n_group", None), "n_group"),
    (with_field(ROUTER, "n_group", 2.0), "n_group"),
    (with_field(ROUTER, "routed_scaling_factor", 2), "routed_scaling_factor"),
    (with_field(ROUTER, "topk_group", [1, 1]), "topk_group"),
    (with_field(ROUTER, "topk_group", []), "topk_group"),
    (with_field(ROUTER, "topk_group", -1), "topk_group"),
    (with_field(ROUTER, "routed_scaling_factor", float("inf")), "routed_scaling_factor"),
    (replace(CACHE, in_place=False), "cache_out"),
    (replace(EXPERTS, dtypes=["float32", "int32", "float32", "float32", "float32"]), "hidden_type is not supported"),
]


def addresses(given: Given) -> list[int]:
    """Of all operands; an output that is in place is at its input."""
    op = OPS[given.op]
    names = [tensor.name for tensor in op.inputs]
    here = {name: (i + 1) * 4096 for i, name in enumerate(names)}
    outputs = [
        here[tensor.in_place_of] if tensor.in_place_of and given.in_place else (len(names) + i + 1) * 4096
        for i, tensor in enumerate(op.outputs)
    ]
    return [*here.values(), *outputs]


def field_arrays(given: Given) -> dict[str, Any]:
    def array(value: Any) -> Any:
        kind = np.float32 if isinstance(value, float) else np.int32
        return np.array(value if isinstance(value, list) else [value], kind)

    return {name: array(value) for name, value in given.fields.items()}


class PythonGlue:
    """A plugin of plugin.py, driven as TensorRT would."""

    def __init__(self, kernels: Path | None):
        import tensorrt_rtx

        self.trt, self.kernels = tensorrt_rtx, kernels
        self.errors: list[str] = []
        logger = SimpleNamespace(log=lambda severity, message: self.errors.append(message))
        made = creators(tensorrt_rtx, logger, None if kernels is None else CudaKernels(kernels))
        self.creators = {creator.name: creator for creator in made}

    def __call__(self, given: Given) -> str:
        trt, self.errors[:] = self.trt, []
        theirs = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3fn": "FP8", "int32": "INT32"}
        types = [getattr(trt.DataType, theirs[dtype]) for dtype in given.dtypes]
        types += [trt.DataType.FLOAT] * (len(given.shapes) - len(types))  # of outputs: nobody looks
        descs = [SimpleNamespace(type=t, dims=trt.Dims(s)) for t, s in zip(types, given.shapes, strict=True)]
        kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}
        arrays = field_arrays(given)
        fields = trt.PluginFieldCollection([trt.PluginField(n, a, kinds[a.dtype.name]) for n, a in arrays.items()])
        plugin = self.creators[given.op].create_plugin("node", fields, trt.TensorRTPhase.BUILD)
        if plugin is None:
            return self.errors[0]
        count, where = len(given.dtypes), addresses(given)
        with contextlib.suppress(ValueError):
            plugin.clone().enqueue(descs[:count], descs[count:], where[:count], where[count:], 2**20, 5)
        return " ".join(self.errors)


class CompiledGlue:
    """What the plugins in C++ do between TensorRT and the kernels."""

    def __init__(self, folder: Path):
        names = [f"{SOURCES}/glue.cpp", f"{SOURCES}/fake_cuda.cpp"]
        names += [f"plugins/tensorrt/{name}.cpp" for name in ("call", "signature")]
        sanitize = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
        self.kernels = compile_to(folder / "libglue.so", "-shared", *sanitize, *names)
        self.call = ctypes.CDLL(str(self.kernels)).glue_call
        self.call.restype = ctypes.c_char_p

    def __call__(self, given: Given) -> str:
        types = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int32"]
        flat = [size for shape in given.shapes for size in shape]
        arrays = field_arrays(given)
        count = len(arrays)
        kinds = [0 if array.dtype == np.int32 else 1 for array in arrays.values()]
        return self.call(  # type: ignore[no-any-return]
            given.op.encode(),
            (ctypes.c_int32 * len(given.dtypes))(*map(types.index, given.dtypes)),
            (ctypes.c_int64 * len(flat))(*flat),
            (ctypes.c_int32 * len(given.shapes))(*map(len, given.shapes)),
            (ctypes.c_void_p * len(given.shapes))(*addresses(given)),
            (ctypes.c_char_p * count)(*(name.encode() for name in arrays)),
            (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays.values())),
            (ctypes.c_int32 * count)(*kinds),
            (ctypes.c_int32 * count)(*(array.size for array in arrays.values())),
            count,
        ).decode()


@pytest.fixture(scope="module", params=["python", "compiled"])
def glue(request: pytest.FixtureRequest, fake_cuda: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return PythonGlue(fake_cuda) if request.param == "python" else CompiledGlue(tmp_path_factory.mktemp("glue"))


@pytest.mark.parametrize(("given", "calls"), CALLS, ids=lambda value: getattr(value, "op", ""))
def test_kernels_get_the_right_arguments(glue: Any, given: Given, calls: list[str]) -> None:
    journal(glue.kernels)
    assert glue(given) == ""
    assert journal(glue.kernels) == calls


@pytest.mark.parametrize(("given", "what"), WRONG, ids=lambda value: getattr(value, "op", value))
def test_wrong_calls_are_refused_with_a_sentence(glue: Any, given: Given, what: str) -> None:
    journal(glue.kernels)
    sentence = glue(given)
    assert what in sentence
    assert given.op in sentence
    assert not [line for line in journal(glue.kernels) if not line.startswith("workspace")]


def test_without_kernels_nothing_runs() -> None:
    assert PythonGlue(None)(ROUTER).startswith("MoERouter: the CUDA kernels are not installed")


# --- The library in C++, where there are headers to build it with ------------------------------------------------


@cache
def compiled_plugins(fake_cuda: Path) -> Path:
    sources = [f"plugins/tensorrt/{name}.cpp" for name in ("plugin", "call", "signature")]
    link = ["-Wl,-z,defs", str(fake_cuda), f"-Wl,-rpath,{fake_cuda.parent}"]
    output = fake_cuda.with_name("libglm_trt_plugins.so")
    return compile_to(output, "-shared", "-fvisibility=hidden", *include_headers(), *sources, *link)


def include_headers() -> list[str]:
    headers = os.environ.get("GLM_TENSORRT_INCLUDE_DIR")
    if not headers:
        pytest.skip("no TensorRT headers: set GLM_TENSORRT_INCLUDE_DIR")
    if not Path(CUDA_INCLUDE_DIR).is_dir():
        pytest.skip(f"no CUDA headers in {CUDA_INCLUDE_DIR}")
    return ["-isystem", headers, "-isystem", CUDA_INCLUDE_DIR]


def test_compiled_plugins_from_network_to_plan_to_kernel(fake_cuda: Path, tmp_path: Path) -> None:
    libraries = [str(compiled_plugins(fake_cuda)), str(fake_cuda), f"-Wl,-rpath,{fake_cuda.parent}"]
    program = compile_to(tmp_path / "drive", *include_headers(), f"{SOURCES}/drive.cpp", *libraries)
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    assert out == [
        *(f"serialized: {name}" for name in (*ROUTER.fields, "kernels")),
        "aliased: -1",
        "enqueue: 0",
        "moe_router 4096 8192 12288 16384 T3 E16 4 2 1 1 2.5 stream 5",
        "serialized: kernels",
        "aliased: 0",
        "enqueue: 0",
        "fp8_cache_write 4096 8192 12288 B2 J3 C32 S5 A16 type 16 stream 5",
        "serialized: kernels",
        "error: FP8CacheWrite: cache_out is not in the memory of cache; bind both to one address.",
        "aliased: 0",
        "enqueue: -1",
        "error: MoERouter: there are 1073741824 fields, expected at most 64.",
        "too many fields: refused",
    ]


def test_compiled_plugins_need_no_tensorrt_library(fake_cuda: Path) -> None:
    library = compiled_plugins(fake_cuda)
    listing = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True).stdout
    defined = {line.split()[-1] for line in listing.splitlines() if " T " in line}
    assert defined == {"getCreators", "setLoggerFinder"}
    assert "nvinfer" not in "".join(line for line in listing.splitlines() if " U " in line)


# --- Networks in TensorRT-RTX, each set of plugins in a process of its own ---------------------------------------


@pytest.fixture(scope="module", params=["none", "python", "compiled"])
def networks(request: pytest.FixtureRequest, fake_cuda: Path) -> Any:
    """What networks.py says: with the plugins in Python without and with kernels, and with those in C++."""
    arguments = [request.param, *([] if request.param == "none" else [str(fake_cuda)])]
    if request.param == "compiled":
        arguments.append(str(compiled_plugins(fake_cuda)))
    command = [sys.executable, f"{SOURCES}/networks.py", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TRT_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3fn": "FP8", "int32": "INT32"}
DIMS = {"T": -1, "B": -1, "S": -1, "E": 16, "K": 4, "D": 64, "F": 32, "J": 2, "C": 32, "A": 16}
COMPUTE = ("bfloat16", "float16", "float32")
BUILT = ["MoERouter", *(f"{name} {compute}" for name in TENSORRT_PLUGINS[1:] for compute in COMPUTE)]


def test_every_plugin_is_registered_once(networks: Any) -> None:
    assert networks["registered"] == sorted(TENSORRT_PLUGINS)
    assert list(networks["ops"]) == BUILT


@pytest.mark.parametrize("what", BUILT)
def test_parsed_network_has_the_plugin(networks: Any, what: str) -> None:
    name, _, compute = what.partition(" ")
    op, seen = OPS[name], networks["ops"][what]

    def expected(tensors: Any) -> list[Any]:
        return [
            [
                TRT_DTYPES[t.dtypes[0] if len(t.dtypes) == 1 else compute],
                [DIMS[letter] * factor for factor, letter in dims(t.shape)],
            ]
            for t in tensors
        ]

    assert seen["layers"] == [["PLUGIN_V3", expected(op.inputs), expected(op.outputs)]]


@pytest.mark.parametrize("what", BUILT)
def test_network_builds_for_two_gpus_with_weights_as_plugin_inputs(networks: Any, what: str) -> None:
    seen = networks["ops"][what]
    if what == "MoEExperts float32" and networks["variant"] != "none":
        assert seen["plan"] is None  # the kernels said no when they were asked for the workspace
        assert "hidden_type is not supported" in seen["errors"][0]
        return
    assert seen["errors"] == []
    assert seen["fields"], "the plan lacks a field"
    assert seen["plan"] < 500_000, "every weight is in the plan once, whatever the number of GPUs and profiles"
    name, _, compute = what.partition(" ")
    types = {"float32": 1, "float16": 10, "bfloat16": 16}.get(compute)
    weights = 17 if name == "FP8MoEExperts" else types
    asks = name in ("MoEExperts", "FP8MoEExperts") and networks["variant"] != "none"
    # The workspace of both profiles was asked for, at their largest sizes.
    assert set(seen["calls"]) == (
        {f"workspace T{T} D64 F32 E16 K4 types {types} {weights}" for T in (4, 64)} if asks else set()
    )


def test_absent_plugin_is_an_error(networks: Any) -> None:
    layers, errors = networks["missing"]
    assert layers is None
    assert "Plugin not found" in " ".join(errors)


def test_in_place_output_is_declared(networks: Any) -> None:
    """TensorRT wants a preview feature for it: without, it tells that it saw the alias."""
    plan, errors = networks["not aliased"]
    assert plan is None
    assert "Aliased I/O" in errors[0]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no top_k", "MoERouter: the field top_k is missing."),
        ("top_k in text", "MoERouter: the field top_k is "),
        ("scale as int", "MoERouter: the field routed_scaling_factor is "),
        ("wrong shape", "MoERouter: correction_bias has shape [16], expected [E]"),
    ],
)
def test_wrong_node_is_a_sentence(networks: Any, what: str, sentence: str) -> None:
    layers, errors = networks[what]
    assert layers is None
    assert errors[0].startswith(sentence)


def test_plan_with_wrong_fields_is_refused(networks: Any) -> None:
    said = networks["reopened"]
    fields = ("missing", "two values", "no value", "other type", "other width", "negative")
    for what in fields:
        assert said[what][0].startswith("MoERouter: the field top_k is "), what
    assert said["not finite"][0].startswith("MoERouter: the field routed_scaling_factor is ")
    kernels = ("other kernels", "no kernels", "unknown kernels")
    if networks["variant"] == "none":
        assert all("the CUDA kernels are not installed" in said[what][0] for what in ("right", *kernels))
    else:
        assert said["right"] == []
        assert all("build the engine again" in said[what][0] for what in kernels)
