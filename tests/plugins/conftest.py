"""What the tests of the ops share: a comparison that explains itself, and an op's evaluators."""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import closeness
import cpu_tools
import cuda_tools
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import untraced
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_evaluator import NUMPY_DTYPES, TENSORRT_OPS, to_numpy, to_torch
from torch import Tensor

import glm_export.plugins.torch_ops  # noqa: F401 (defines torch.ops.glm)
from glm_export.exporter.tensorrt.lower import lower
from glm_export.plugins.bodies import OPSET, portable_functions
from glm_export.plugins.library import cpu_kernels, forced_cpu
from glm_export.plugins.ops import OPS
from glm_export.plugins.schema import DOMAIN, VERSION
from glm_export.plugins.schema import Tensor as TensorSchema

ONNX_DTYPES = {dtype: helper.np_dtype_to_tensor_dtype(numpy) for dtype, numpy in NUMPY_DTYPES.items()}
TORCH_DTYPES = {dtype: torch_dtype for torch_dtype, dtype in ONNX_DTYPES.items()}

FORMS = ("reference", "onnxruntime", "onnx_reference", "tensorrt", *cpu_tools.EVALUATORS)


class ExpectClose(Protocol):
    def __call__(self, got: Tensor, want: Tensor, tolerance: float | Tensor, what: str = ...) -> None: ...


class Evaluate(Protocol):
    form: str
    """In which form the op runs: one of FORMS."""

    def __call__(self, name: str, *inputs: Tensor | None, outputs: int = ..., **attributes: float) -> list[Tensor]: ...


class RunKernel(Protocol):
    isa: str

    def __call__(self, name: str, inputs: Inputs, *, threads: int = ..., **attributes: float) -> list[Tensor]: ...


Inputs = dict[str, Tensor | None]
"""By name and in the order of the node; None where one is left out."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The tensors of these tests are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def expect_close() -> ExpectClose:
    """Compares element by element in float64; a failure names the worst element."""
    return closeness.expect_close


def pytest_make_parametrize_id(val: object) -> str | None:
    """Tells by a test's name that its AVX-512 is emulated."""
    emulated = isinstance(val, str) and val == "kernel_avx512" and cpu_tools.is_emulated("avx512")
    return f"{val}_emulated" if emulated else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What `evaluate` runs on: FORMS and what the module names beyond them, unless the test says it itself."""
    chosen = any("evaluate" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "evaluate" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("evaluate", [*FORMS, *getattr(metafunc.module, "MORE_EVALUATORS", ())], indirect=True)


@pytest.fixture
def evaluate(request: pytest.FixtureRequest) -> Evaluate:
    """An op on real tensors.

    It runs as the torch op, as a one-node model with its portable body in one of two ONNX evaluators or with its
    TensorRT body in one of them, as its CPU kernel for one instruction set, or as its CUDA kernel (MORE_EVALUATORS).
    """
    runs = {
        "reference": _torch_op,
        "onnxruntime": _onnxruntime,
        "onnx_reference": _onnx_reference,
        "tensorrt": _tensorrt,
    }
    runs |= {f"kernel_{isa}": functools.partial(_kernel, isa) for isa in cpu_tools.ISAS}
    runs |= {name: functools.partial(cuda_tools.run, name) for name in cuda_tools.EVALUATORS}
    run: Callable[..., list[Tensor]] = runs[request.param]

    def evaluate(name: str, *inputs: Tensor | None, outputs: int = 0, **attributes: float) -> list[Tensor]:
        op = OPS[name]
        outputs = outputs or len(op.outputs)
        found = run(name, inputs, outputs, attributes)
        assert len(found) == outputs
        for tensor, schema in zip(found, op.outputs[:outputs], strict=True):
            assert str(tensor.dtype).removeprefix("torch.") in schema.dtypes, (name, schema.name, tensor.dtype)
        return found

    evaluate.form = request.param  # type: ignore[attr-defined]
    return cast(Evaluate, evaluate)


@pytest.fixture(params=cpu_tools.ISAS, ids=cpu_tools.EVALUATORS)
def kernel(request: pytest.FixtureRequest) -> RunKernel:
    """An op's CPU kernel alone: the model has neither a body nor shapes, so that all there is reaches the kernel."""
    if cpu_tools.library_for(request.param) is None:
        pytest.skip(f"this machine has no {request.param}")

    def run(name: str, inputs: Inputs, *, threads: int = 1, **attributes: float) -> list[Tensor]:
        dtypes = tuple((x, None if value is None else value.dtype) for x, value in inputs.items())
        session = _bare_session(request.param, name, dtypes, tuple(attributes.items()), threads)
        feeds = {x: _ort_value(value) for x, value in inputs.items() if value is not None}
        names = [output.name for output in session.get_outputs()]
        return [_to_torch(value) for value in session.run_with_ort_values(names, feeds)]

    run.isa = request.param  # type: ignore[attr-defined]
    return cast(RunKernel, run)


def _torch_op(name: str, inputs: tuple[Tensor | None, ...], outputs: int, attributes: dict[str, float]) -> list[Tensor]:
    torch_name = OPS[name].torch_name
    op: Callable[..., Any] = getattr(torch.ops.glm, torch_name) if torch_name else untraced.REFERENCES[name]
    before = [None if x is None else x.clone() for x in inputs]
    found = op(*inputs, *(attributes[a.name] for a in OPS[name].attributes))
    for old, new in zip(before, inputs, strict=True):
        assert old is None or (new is not None and torch.equal(old.view(torch.uint8), new.view(torch.uint8)))
    return [found] if isinstance(found, Tensor) else list(found)[:outputs]


def _onnxruntime(
    name: str, inputs: tuple[Tensor | None, ...], outputs: int, attributes: dict[str, float]
) -> list[Tensor]:
    session = _ort_session(name, _types(inputs), outputs, tuple(attributes.items()))
    return run_in_onnxruntime(session, name, inputs)


def _kernel(
    isa: str, name: str, inputs: tuple[Tensor | None, ...], outputs: int, attributes: dict[str, float]
) -> list[Tensor]:
    library = cpu_tools.library_for(isa)
    if library is None:
        pytest.skip(f"this machine has no {isa}")
    if name not in cpu_kernels(library).ops:
        pytest.skip(f"{name} has no kernel")
    session = _kernel_session(isa, name, _types(inputs), outputs, tuple(attributes.items()))
    return run_in_onnxruntime(session, name, inputs)


def run_in_onnxruntime(session: Any, name: str, inputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Runs a session of one_node_model."""
    feeds = {s.name: _ort_value(x) for s, x in zip(OPS[name].inputs, inputs, strict=True) if x is not None}
    names = [output.name for output in session.get_outputs()]
    return [_to_torch(value) for value in session.run_with_ort_values(names, feeds)]


def _ort_value(x: Tensor) -> Any:
    """The tensor in its own memory, for which it has to live on."""
    # numpy has no bfloat16 nor FP8 of its own: ONNX Runtime is given the bytes and the type.
    values = to_numpy(x)
    bits = values.view(f"u{values.itemsize}") if values.dtype.kind not in "fi" else values
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_DTYPES[x.dtype])


def _onnx_reference(
    name: str, inputs: tuple[Tensor | None, ...], outputs: int, attributes: dict[str, float]
) -> list[Tensor]:
    return _run_onnx_reference(_onnx_evaluator(name, _types(inputs), outputs, tuple(attributes.items())), name, inputs)


def _tensorrt(name: str, inputs: tuple[Tensor | None, ...], outputs: int, attributes: dict[str, float]) -> list[Tensor]:
    if OPS[name].outputs[outputs - 1].optional:
        pytest.skip("TensorRT gives no attention probabilities")
    evaluator = _tensorrt_evaluator(name, _types(inputs), outputs, tuple(attributes.items()))
    return _run_onnx_reference(evaluator, name, inputs)


def _run_onnx_reference(evaluator: Any, name: str, inputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    feeds = {s.name: to_numpy(x) for s, x in zip(OPS[name].inputs, inputs, strict=True) if x is not None}
    with np.errstate(all="ignore"):  # sigmoid of a large number overflows on its way to 0
        return [to_torch(x) for x in evaluator.run(None, feeds)]


Types = tuple[tuple[torch.dtype, int] | None, ...]
"""Dtype and rank of every input, None where an optional one is absent."""


def _types(inputs: tuple[Tensor | None, ...]) -> Types:
    return tuple(None if x is None else (x.dtype, x.ndim) for x in inputs)


@functools.cache
def _ort_session(name: str, types: Types, outputs: int, attributes: tuple[tuple[str, float], ...]) -> Any:
    return _session(one_node_model(name, types, outputs, attributes), ort.SessionOptions())


@functools.cache
def _kernel_session(isa: str, name: str, types: Types, outputs: int, attributes: tuple[tuple[str, float], ...]) -> Any:
    return _session_on(isa, one_node_model(name, types, outputs, attributes))


@functools.cache
def _bare_session(
    isa: str,
    name: str,
    dtypes: tuple[tuple[str, torch.dtype | None], ...],
    attributes: tuple[tuple[str, float], ...],
    threads: int,
) -> Any:
    op, present = OPS[name], {x: dtype for x, dtype in dtypes if dtype is not None}
    outputs, first = [output for output in op.outputs if not output.optional], next(iter(present.values()))
    names = [x if x in present else "" for x, _ in dtypes]
    node = helper.make_node(name, names, [output.name for output in outputs], domain=DOMAIN, **dict(attributes))
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info(x, ONNX_DTYPES[dtype], None) for x, dtype in present.items()],
        [helper.make_tensor_value_info(x.name, _onnx_dtype(x, present, first), None) for x in outputs],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return _session_on(isa, helper.make_model(graph, opset_imports=imports, ir_version=10), threads=threads)


def _session_on(isa: str, model: onnx.ModelProto, *, threads: int = 1) -> Any:
    with forced_cpu(isa):
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(cpu_tools.library_for(isa)))
        options.enable_cpu_mem_arena = False  # each output ends where its memory does, for those who watch that
        return _session(model, options, threads=threads)


def _session(model: onnx.ModelProto, options: ort.SessionOptions, *, threads: int = 1) -> Any:
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def build_probe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles the op of probe.cpp with the library's glue, and with further flags, into a library of its own."""

    def build(*flags: str) -> Path:
        library = tmp_path_factory.mktemp("probe") / "libprobe.so"
        sources = [*(f"plugins/cpu/{name}.cpp" for name in ("op", "isa", "library")), "tests/plugins/probe.cpp"]
        flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", *flags)
        command = [cpu_tools.compiler(), *flags, "-I.", *sources, "-Wl,-z,nodelete", "-o", str(library)]
        subprocess.run(command, cwd=cpu_tools.REPOSITORY, check=True)
        return library

    return build


@functools.cache
def _onnx_evaluator(name: str, types: Types, outputs: int, attributes: tuple[tuple[str, float], ...]) -> Any:
    return ReferenceEvaluator(one_node_model(name, types, outputs, attributes))


@functools.cache
def _tensorrt_evaluator(name: str, types: Types, outputs: int, attributes: tuple[tuple[str, float], ...]) -> Any:
    assert types[0] is not None
    compute_dtype = str(types[0][0]).removeprefix("torch.")
    model = one_node_model(name, types, outputs, attributes)
    lowered = lower(model, compute_dtype=compute_dtype, capacity=1, experts="decomposed")  # nobody looks at C here
    return ReferenceEvaluator(lowered, new_ops=TENSORRT_OPS)


@pytest.fixture(scope="session")
def one_node() -> Callable[..., bytes]:
    """An op's one-node model in float32 (or whatever an input has to be), for those who will not run it."""

    def make(name: str, *, outputs: int) -> bytes:
        op = OPS[name]
        types = tuple((getattr(torch, x.dtypes[0]), len(x.shape.split(","))) for x in op.inputs)
        attributes = tuple((a.name, a.type(2)) for a in op.attributes)
        model: bytes = one_node_model(name, types, outputs, attributes).SerializeToString()
        return model

    return make


def one_node_model(name: str, types: Types, outputs: int, attributes: tuple[tuple[str, float], ...]) -> onnx.ModelProto:
    """One node of the op with its portable body; all sizes are free."""
    op = OPS[name]
    present = [(schema.name, t) for schema, t in zip(op.inputs, types, strict=True) if t is not None]
    compute = next(dtype for _, (dtype, _) in present if dtype.itemsize > 1)  # an FP8 cache may come first
    node = helper.make_node(
        name,
        [schema.name if t is not None else "" for schema, t in zip(op.inputs, types, strict=True)],
        [schema.name for schema in op.outputs[:outputs]],
        domain=DOMAIN,
        **dict(attributes),
    )
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info(n, ONNX_DTYPES[dtype], [None] * rank) for n, (dtype, rank) in present],
        [_output(schema, dict(present), present[0][1]) for schema in op.outputs[:outputs]],
    )
    attentions = any(schema.name == "attentions" for schema in op.outputs[:outputs])
    functions = portable_functions(compute_dtype=str(compute).removeprefix("torch."), attentions=attentions)
    model = helper.make_model(
        graph,
        functions=_with_callees(name, {f.name: f for f in functions}),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _with_callees(name: str, functions: dict[str, onnx.FunctionProto]) -> list[onnx.FunctionProto]:
    """A function and those that it calls, each after those that it calls itself."""
    called = dict.fromkeys(node.op_type for node in functions[name].node if node.domain == DOMAIN)
    found = {f.name: f for callee in called for f in _with_callees(callee, functions)}
    return [*found.values(), functions[name]]


def _output(
    schema: TensorSchema, present: dict[str, tuple[torch.dtype, int]], first: tuple[torch.dtype, int]
) -> onnx.ValueInfoProto:
    rank = first[1] if "..." in schema.shape else len(schema.shape.split(","))
    dtypes = {name: dtype for name, (dtype, _) in present.items()}
    return helper.make_tensor_value_info(schema.name, _onnx_dtype(schema, dtypes, first[0]), [None] * rank)


def _onnx_dtype(schema: TensorSchema, present: dict[str, torch.dtype], first: torch.dtype) -> int:
    """An output of the compute dtypes has that of the input it updates, or of the first; the others have one only."""
    several = present.get(schema.in_place_of or "", first)
    return ONNX_DTYPES[several if len(schema.dtypes) > 1 else getattr(torch, schema.dtypes[0])]


def _to_torch(value: Any) -> Tensor:
    dtype = TORCH_DTYPES[value.element_type()]
    size = math.prod(value.shape()) * dtype.itemsize
    if not size:
        return torch.empty(value.shape(), dtype=dtype)
    data = bytearray(ctypes.string_at(value.data_ptr(), size))
    return torch.frombuffer(data, dtype=dtype).reshape(value.shape())
