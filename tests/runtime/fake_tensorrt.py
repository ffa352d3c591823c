"""TensorRT's runtime classes over ONNX Runtime: a plan is an ONNX file, and a context runs it where it was told to.

It refuses what the library refuses, and some things it would not notice: a plan with host code, an address or shape
that was not set, a shape outside the profile, buffers that should be one and are two, or two and overlap, memory that
nobody allocated, a capture without a run before it.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
from fake_cuda import FakeCuda
from onnx import TensorProto, helper

from glm_export.runtime import cuda, trt_engine
from glm_export.runtime.tensorrt_library import Library

VERSION = "11.4.0.7"
SCRATCH = {0: 4096, 1: 65536}
"""Scratch memory per profile."""


class DataType(Enum):
    FLOAT, HALF, BF16, INT32, INT64, FP8 = (
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.FLOAT8E4M3FN,
    )


ITEMSIZE = {DataType.FLOAT: 4, DataType.HALF: 2, DataType.BF16: 2, DataType.INT64: 8, DataType.FP8: 1}


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = 0, 1, 2


class TensorLocation(IntEnum):
    DEVICE, HOST = 0, 1


class Strategy(IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = 0, 1, 2


class GraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = 0, 1


def plan_of(model: onnx.ModelProto, *, batch: int, prefill: int, **changes: Any) -> bytes:
    """A plan; `changes` break it."""
    facts = {
        "version": VERSION,
        "host_code": False,
        "profiles": 2,
        "aliases": {
            output.name: output.name.replace("_out.", ".") for output in model.graph.output if "_out." in output.name
        },
        "batch": batch,
        "prefill": prefill,
        "location": {},
    } | changes
    plan = onnx.ModelProto()
    plan.CopyFrom(model)
    helper.set_model_props(plan, {"plan": json.dumps(facts)})
    return bytes(plan.SerializeToString())


class FakeLogger:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def take_errors(self) -> list[str]:
        errors, self.errors = self.errors, []
        return errors


class FakeTensorRt:
    """The module, for one device."""

    def __init__(self, cuda: FakeCuda, target: str) -> None:
        self.cuda = cuda
        self.logger = FakeLogger()
        self.deserialized = 0
        self.__version__ = VERSION
        self.DataType, self.TensorIOMode, self.TensorLocation = DataType, TensorIOMode, TensorLocation
        self.ExecutionContextAllocationStrategy = Strategy
        if target == "tensorrt-rtx":
            self.CudaGraphStrategy = GraphStrategy
        self.is_rtx = target == "tensorrt-rtx"
        self.library = Library(target=target, module=self, logger=self.logger)

    def Runtime(self, logger: FakeLogger) -> Any:  # noqa: N802
        assert logger is self.logger, "one logger per process"
        return FakeRuntime(self)


@dataclass
class FakeGpu:
    """The fake device and the libraries on it."""

    cuda: FakeCuda = field(default_factory=FakeCuda)
    libraries: dict[str, FakeTensorRt] = field(default_factory=dict)

    @classmethod
    def install(cls, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
        """Puts them in the place of the real ones."""
        fake = cls()
        monkeypatch.setattr(cuda, "_cuda", lambda: fake.cuda)
        monkeypatch.setattr(trt_engine, "load_library", lambda target: fake.library(target).library)
        return fake

    def library(self, target: str) -> FakeTensorRt:
        if target not in self.libraries:
            self.libraries[target] = FakeTensorRt(self.cuda, target)
        return self.libraries[target]


class FakeRuntime:
    def __init__(self, module: FakeTensorRt) -> None:
        self.module = module
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
        self.module.deserialized += 1
        try:
            model = onnx.load_from_string(bytes(plan))
            facts = json.loads(next(entry.value for entry in model.metadata_props if entry.key == "plan"))
        except Exception as error:
            self.module.logger.errors.append(f"[runtime.cpp] bad plan: {error}")
            return None
        if facts["host_code"] and not self.engine_host_code_allowed:
            self.module.logger.errors.append("[runtime.cpp] host code is not allowed")
            return None
        return FakeEngine(self.module, model, facts)


class FakeEngine:
    def __init__(self, module: FakeTensorRt, model: onnx.ModelProto, facts: dict[str, Any]) -> None:
        self.module, self.facts = module, facts
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.ort = onnxruntime.InferenceSession(model.SerializeToString(), options)
        self.tensors = {
            tensor.name: SimpleNamespace(
                mode=mode,
                dtype=DataType(tensor.type.tensor_type.elem_type),
                shape=[dim.dim_param or dim.dim_value for dim in tensor.type.tensor_type.shape.dim],
            )
            for mode, tensors in (
                (TensorIOMode.INPUT, model.graph.input),
                (TensorIOMode.OUTPUT, model.graph.output),
            )
            for tensor in tensors
        }
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = facts["profiles"]

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name].mode

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.tensors[name].dtype

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation(self.facts["location"].get(name, TensorLocation.DEVICE))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(dim, str) else dim for dim in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert self.tensors[name].mode == TensorIOMode.INPUT
        largest = {"B": self.facts["batch"], "S": (1, self.facts["prefill"])[profile]}
        shapes = [
            tuple(dims[dim] if isinstance(dim, str) else dim for dim in self.tensors[name].shape)
            for dims in ({"B": 1, "S": 1}, largest)
        ]
        return [shapes[0], shapes[1], shapes[1]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.facts["aliases"].get(name)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH[profile]

    def create_runtime_config(self) -> Any:
        assert self.module.is_rtx
        config = SimpleNamespace(cuda_graph_strategy=GraphStrategy.DISABLED, strategy=Strategy.STATIC)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, how: Any) -> FakeContext:
        graphs = False
        if self.module.is_rtx:
            graphs = how.cuda_graph_strategy == GraphStrategy.WHOLE_GRAPH_CAPTURE
            how = how.strategy
        assert how == Strategy.USER_MANAGED
        return FakeContext(self, own_graphs=graphs)


class FakeContext:
    def __init__(self, engine: FakeEngine, *, own_graphs: bool) -> None:
        self.engine, self.own_graphs = engine, own_graphs
        self.cuda = engine.module.cuda
        self.profile: int | None = None
        self.scratch: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran: object = None
        """Shapes and addresses of the last run outside a capture."""

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert self.profile is None, "a profile for good"
        self.cuda.put(stream, lambda: setattr(self, "profile", profile))
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        assert self.profile is not None, "wait for the profile first"
        assert size >= SCRATCH[self.profile]
        assert address % 256 == 0
        assert self.cuda.view(address, size) is not None
        self.scratch = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None, "wait for the profile first"
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or not all(a <= dim <= b for a, dim, b in zip(low, shape, high, strict=True)):
            return self._refuse(f"{name} {shape} is outside profile {self.profile}: {low}..{high}")
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        dims: dict[str, int] = {}
        for known, shape in self.shapes.items():
            symbols = self.engine.tensors[known].shape
            dims |= {dim: size for dim, size in zip(symbols, shape, strict=True) if isinstance(dim, str)}
        dims["T"] = dims.get("B", -1) * dims.get("S", -1)
        return tuple(dims.get(dim, -1) if isinstance(dim, str) else dim for dim in self.engine.tensors[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors:
            return self._refuse(f"there is no tensor {name}")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if reason := self._not_ready():
            return self._refuse(reason)
        state = (dict(self.shapes), dict(self.addresses))
        if self.cuda.capturing is not None:
            if self.own_graphs or self.engine.module.is_rtx:
                return self._refuse("this library captures by itself")
            if self.ran != state:
                return self._refuse("a capture before a run with these shapes and addresses")
        else:
            self.ran = state
        return not self.cuda.put(stream, lambda: self._run(*state))

    def _not_ready(self) -> str:
        if self.scratch is None:
            return "no scratch memory"
        spans = []
        for name, tensor in self.engine.tensors.items():
            if tensor.mode == TensorIOMode.INPUT and name not in self.shapes:
                return f"the shape of {name} is not set"
            if name not in self.addresses:
                return f"the address of {name} is not set"
            size = ITEMSIZE[tensor.dtype]
            for dim in self.get_tensor_shape(name):
                size *= dim
            if self.cuda.view(self.addresses[name], size) is None:
                return f"{name} is not {size} bytes of device memory"
            if (alias := self.engine.get_aliased_input_tensor(name)) is not None:
                if self.addresses[alias] != self.addresses[name]:
                    return f"{name} and {alias} must share their address"
            elif "_out." not in name:
                spans.append((self.addresses[name], self.addresses[name] + size, name))
        spans.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(spans):
            if start < end:
                return f"{first} and {second} overlap"
        return ""

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        io = self.engine.ort.io_binding()
        for name, tensor in self.engine.tensors.items():
            bind = io.bind_input if tensor.mode == TensorIOMode.INPUT else io.bind_output
            shape = shapes.get(name) or self.get_tensor_shape(name)
            bind(name, "cpu", 0, tensor.dtype.value, shape, addresses[name])
        self.engine.ort.run_with_iobinding(io)

    def _refuse(self, reason: str) -> bool:
        self.engine.module.logger.errors.append(f"[executionContext.cpp] {reason}")
        return False
