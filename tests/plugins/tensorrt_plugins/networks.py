"""Parses and builds a network of one plugin per op with TensorRT-RTX; prints what came of it as JSON.

A process of its own, because TensorRT's registry and logger are the process's:

    networks.py none                     the plugins in Python, no CUDA kernels
    networks.py python KERNELS           the plugins in Python, kernels from this library
    networks.py compiled KERNELS PLUGINS the plugins of a library in C++ that is linked to those kernels
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from glm_export.plugins import library
from glm_export.plugins.cuda.api import ABI, CudaKernels
from glm_export.plugins.ops import OPS, TENSORRT_PLUGINS
from glm_export.plugins.schema import DOMAIN, OpSchema, Tensor
from glm_export.plugins.tensorrt import registry
from glm_export.plugins.tensorrt.signature import dims
from glm_export.runtime import tensorrt_library

SIZES = {"E": 16, "K": 4, "D": 64, "F": 32, "J": 2, "C": 32, "A": 16}
PROFILES = ({"T": 4, "B": 4, "S": 1}, {"T": 64, "B": 4, "S": 16})
"""The largest sizes of decoding and of prefill; the other letters are fixed."""
FIELDS = {"top_k": 4, "n_group": 4, "topk_group": 2, "norm_topk_prob": 1, "routed_scaling_factor": 2.5}
CAPABILITIES = ("SM89", "SM120")
_ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "int32": TensorProto.INT32,
}


def model(op: OpSchema, compute: str, fields: dict[str, Any]) -> ModelProto:
    """One node. What has a dynamic dimension is an input, and so is the cache; everything else is a constant."""
    inputs, outputs, constants = [], [], []
    for tensor in (*op.inputs, *op.outputs):
        kind = _ONNX_TYPES[tensor.dtypes[0] if len(tensor.dtypes) == 1 else compute]
        shape = [factor * SIZES[letter] if letter in SIZES else letter for factor, letter in dims(tensor.shape)]
        if tensor in op.outputs:
            outputs.append(helper.make_tensor_value_info(tensor.name, kind, shape))
        elif all(isinstance(size, int) for size in shape):
            values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 7
            raw = values.astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()
            constants.append(helper.make_tensor(tensor.name, kind, shape, raw, raw=True))
        else:
            inputs.append(helper.make_tensor_value_info(tensor.name, kind, shape))
    names = [[t.name for t in tensors] for tensors in (op.inputs, op.outputs)]
    plugin = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
    node = helper.make_node(op.name, *names, domain=DOMAIN, **plugin, **fields)
    graph = helper.make_graph([node], op.name, inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(DOMAIN, 1)])


def parse(lib: Any, made: ModelProto) -> tuple[Any, Any, list[Any] | None]:
    """Builder, network, and its plugin layers as (kind, inputs, outputs); None if it can not be parsed."""
    builder = lib.module.Builder(lib.logger)
    network = builder.create_network()
    if not lib.module.OnnxParser(network, lib.logger).parse(made.SerializeToString()):
        return builder, network, None
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    described = [
        (
            layer.type.name,
            [describe(layer.get_input(i)) for i in range(layer.num_inputs)],
            [describe(layer.get_output(i)) for i in range(layer.num_outputs)],
        )
        for layer in layers
        if layer.type.name != "CONSTANT"
    ]
    return builder, network, described


def describe(tensor: Any) -> tuple[str, list[int]]:
    return tensor.dtype.name, list(tensor.shape)


def plan_of(lib: Any, op: OpSchema, builder: Any, network: Any, *, aliased: bool) -> bytes | None:
    trt = lib.module
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, aliased)
    for largest in PROFILES:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            name = network.get_input(i).name
            letters = dims(_tensor(op, name).shape)
            most = [factor * (SIZES | largest)[letter] for factor, letter in letters]
            least = [size if letter in SIZES else factor for (factor, letter), size in zip(letters, most, strict=True)]
            profile.set_shape(name, least, most, most)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(CAPABILITIES)
    for i, capability in enumerate(CAPABILITIES):
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), i)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


def _tensor(op: OpSchema, name: str) -> Tensor:
    return next(tensor for tensor in op.inputs if tensor.name == name)


def fields_for(op: OpSchema) -> dict[str, Any]:
    return {attribute.name: FIELDS[attribute.name] for attribute in op.attributes}


def reopened(lib: Any, fields: list[tuple[str, Any]]) -> list[str]:
    """What the router's creator says to the fields of a plan; nothing if it takes them."""
    trt = lib.module
    kinds = {"int32": "INT32", "float32": "FLOAT32", "int64": "INT64"}
    given = [
        trt.PluginField(name, array, getattr(trt.PluginFieldType, kinds[array.dtype.name])) for name, array in fields
    ]
    creator = trt.get_plugin_registry().get_creator("MoERouter", "1", DOMAIN)
    plugin = creator.create_plugin("router", trt.PluginFieldCollection(given), trt.TensorRTPhase.RUNTIME)
    errors: list[str] = lib.logger.take_errors()
    assert (plugin is None) == bool(errors)
    return errors


def reopened_all(lib: Any) -> dict[str, list[str]]:
    """Plans with everything that can be wrong with their fields."""
    right: dict[str, Any] = {
        name: np.array([value], np.float32 if isinstance(value, float) else np.int32) for name, value in FIELDS.items()
    } | {"kernels": np.array([ABI], np.int32)}
    changes: dict[str, dict[str, Any]] = {
        "right": {},
        "missing": {"top_k": None},
        "two values": {"top_k": np.array([4, 4], np.int32)},
        "no value": {"top_k": np.array([], np.int32)},
        "other type": {"top_k": np.array([4], np.float32)},
        "other width": {"top_k": np.array([4], np.int64)},
        "negative": {"top_k": np.array([-1], np.int32)},
        "not finite": {"routed_scaling_factor": np.array([np.nan], np.float32)},
        "other kernels": {"kernels": np.array([ABI + 1], np.int32)},
        "no kernels": {"kernels": np.array([0], np.int32)},
        "unknown kernels": {"kernels": None},
    }
    return {
        what: reopened(lib, [(name, array) for name, array in (right | change).items() if array is not None])
        for what, change in changes.items()
    }


def main(variant: str, kernels: str = "", plugins: str = "") -> None:
    library.cuda_library = registry.cuda_library = lambda: Path(kernels) if kernels else None
    registry.CudaKernels = lambda: CudaKernels(Path(kernels))  # type: ignore[assignment, misc]
    registry.tensorrt_plugin_library = lambda: Path(plugins) if plugins else None
    register, tensorrt_library.register = tensorrt_library.register, lambda module, logger: None
    lib = tensorrt_library.load_library("tensorrt-rtx")
    result: dict[str, Any] = {"variant": variant, "ops": {}}
    router = OPS["MoERouter"]
    missing = parse(lib, model(router, "", fields_for(router)))[2]
    result["missing"] = (missing, lib.logger.take_errors())

    for _ in range(2):
        register(lib.module, lib.logger)
    result["registered"] = sorted(c.name for c in lib.module.get_plugin_registry().all_creators if c.name in OPS)
    journal = None
    if kernels:
        journal = ctypes.CDLL(kernels).fake_journal
        journal.restype = ctypes.c_char_p
    for name in TENSORRT_PLUGINS:
        op = OPS[name]
        choices = {dtype for tensor in op.inputs for dtype in tensor.dtypes if len(tensor.dtypes) > 1} or {""}
        for compute in sorted(choices):
            builder, network, layers = parse(lib, model(op, compute, fields_for(op)))
            plan = plan_of(lib, op, builder, network, aliased=name == "FP8CacheWrite")
            result["ops"][f"{name} {compute}".strip()] = {
                "layers": layers,
                "plan": plan and len(plan),
                "fields": plan is not None and all(field.encode() in plan for field in (*fields_for(op), "kernels")),
                "calls": journal().decode().splitlines() if journal else [],
                "errors": lib.logger.take_errors(),
            }
    cache = OPS["FP8CacheWrite"]
    builder, network, _ = parse(lib, model(cache, "bfloat16", {}))
    result["not aliased"] = (plan_of(lib, cache, builder, network, aliased=False), lib.logger.take_errors())
    wrong = {"no top_k": {"top_k": None}, "top_k in text": {"top_k": "4"}, "scale as int": {"routed_scaling_factor": 2}}
    for what, change in wrong.items():
        fields = {name: value for name, value in (FIELDS | change).items() if value is not None}
        result[what] = (parse(lib, model(router, "", fields))[2], lib.logger.take_errors())
    odd = model(router, "", FIELDS)
    odd.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 17
    result["wrong shape"] = (parse(lib, odd)[2], lib.logger.take_errors())
    result["reopened"] = reopened_all(lib)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
