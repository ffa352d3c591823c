"""Our ops as TensorRT plugins (IPluginV3) in Python, made from their schemas.

There is nothing about a single op here: dtypes, shapes, fields and in-place outputs come from the schema
(signature.py), the kernels from the CUDA library (launch.py). `module` is tensorrt or tensorrt_rtx, whose classes have
the same names.

Without the CUDA library networks still parse and build, since that needs only shapes. Such a plan remembers it, and is
refused when it is opened.
"""

# mypy: allow-subclassing-any
# (TensorRT comes without types.)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from glm_export.plugins.cuda.api import ABI, CudaError, CudaKernels
from glm_export.plugins.ops import OPS, TENSORRT_PLUGINS
from glm_export.plugins.schema import DOMAIN, VERSION, OpSchema
from glm_export.plugins.tensorrt.launch import Call, launch, workspace_bytes
from glm_export.plugins.tensorrt.signature import Numbers, dims, field_arrays, read_fields, sizes, variable_dtype

_DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3fn": "FP8", "int32": "INT32"}
_FIELD_TYPES = {int: "INT32", float: "FLOAT32"}


def creators(module: Any, logger: Any, kernels: CudaKernels | None) -> list[Any]:
    """The plugin creators of all ops that TensorRT runs as plugins.

    Args:
        module: tensorrt or tensorrt_rtx.
        logger: an ILogger, which is told what is wrong with a node or a plan.
        kernels: what runs them; None where they were not built.
    """
    plugin = _plugin_class(module, logger, kernels)
    return [_make_creator(module, logger, kernels, plugin, OPS[name]) for name in TENSORRT_PLUGINS]


def _make_creator(module: Any, logger: Any, kernels: CudaKernels | None, plugin: Any, op: OpSchema) -> Any:
    class Creator(module.IPluginCreatorV3One):
        """Makes plugins from the attributes of a node or the fields of a plan."""

        def __init__(self) -> None:
            module.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = op.name, str(VERSION), DOMAIN
            kinds = [getattr(module.PluginFieldType, _FIELD_TYPES[a.type]) for a in op.attributes]
            self.field_names = module.PluginFieldCollection(
                [module.PluginField(a.name, b"", kind) for a, kind in zip(op.attributes, kinds, strict=True)]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            # None makes the library give up; an exception would print a traceback first.
            try:
                attributes, built_for = read_fields(op, fields)
                if phase == module.TensorRTPhase.RUNTIME:
                    _check_version(op, kernels, built_for)
                return plugin(op, attributes)
            except ValueError as error:
                logger.log(module.ILogger.Severity.ERROR, str(error))
                return None

    return Creator()


def _there(op: OpSchema, kernels: CudaKernels | None) -> CudaKernels:
    if kernels is None:
        raise ValueError(
            f"{op.name}: the CUDA kernels are not installed; install glm-export where nvcc is on the path."
        )
    return kernels


def _check_version(op: OpSchema, kernels: CudaKernels | None, built_for: int | None) -> None:
    _there(op, kernels)
    if built_for != ABI:
        raise ValueError(
            f"{op.name}: the engine was built for version {built_for or 'none'} of the CUDA kernels, installed is "
            f"{ABI}; build the engine again."
        )


def _plugin_class(module: Any, logger: Any, kernels: CudaKernels | None) -> Any:
    names = {getattr(module.DataType, theirs): ours for ours, theirs in _DATA_TYPES.items()}

    class Plugin(module.IPluginV3, module.IPluginV3OneCore, module.IPluginV3OneBuildV2, module.IPluginV3OneRuntime):
        """One node."""

        def __init__(self, op: OpSchema, attributes: Numbers) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = op.name, str(VERSION), DOMAIN
            self.num_outputs = len(op.outputs)
            self.timing_cache_id = ""  # there is one tactic: nothing to time
            self._op, self._attributes = op, attributes

        @contextmanager
        def _reports(self) -> Iterator[None]:
            """Tells the logger what is wrong; the binding turns the exception into an error code."""
            try:
                yield
            except (ValueError, CudaError) as error:
                sentence = f"{self._op.name}: {error}" if isinstance(error, CudaError) else str(error)
                logger.log(module.ILogger.Severity.ERROR, sentence)
                raise ValueError(sentence) from error

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self._op, self._attributes)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            # The library reads the arrays later: they live as long as the plugin.
            self._arrays = field_arrays(self._op, self._attributes, ABI if kernels else 0)
            kinds = {np.dtype(np.int32): "INT32", np.dtype(np.float32): "FLOAT32"}
            return module.PluginFieldCollection(
                [
                    module.PluginField(name, array, getattr(module.PluginFieldType, kinds[array.dtype]))
                    for name, array in self._arrays.items()
                ]
            )

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            with self._reports():
                chosen = variable_dtype(self._op, [names.get(kind, str(kind)) for kind in input_types])
            ours = [out.dtypes[0] if len(out.dtypes) == 1 else chosen for out in self._op.outputs]
            return [getattr(module.DataType, _DATA_TYPES[dtype]) for dtype in ours if dtype]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:
            known = [[dim.get_constant_value() if dim.is_constant() else -1 for dim in shape] for shape in inputs]
            with self._reports():
                found = sizes(self._op, known, self._attributes)
            symbols = {
                letter: dim
                for tensor, shape in zip(self._op.inputs, inputs, strict=True)
                for (factor, letter), dim in zip(dims(tensor.shape), shape, strict=True)
                if factor == 1
            }
            symbols |= {letter: builder.constant(size) for letter, size in found.items()}
            return [
                module.DimsExprs([symbols[letter] for _, letter in dims(output.shape)]) for output in self._op.outputs
            ]

        def get_aliased_input(self, output: int) -> int:
            origin = self._op.outputs[output].in_place_of
            return -1 if origin is None else [tensor.name for tensor in self._op.inputs].index(origin)

        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            described = [tensor.desc for tensor in tensors[: position + 1]]
            operands = (*self._op.inputs, *self._op.outputs)[: position + 1]
            dtype = names.get(described[-1].type)
            if described[-1].format != module.TensorFormat.LINEAR or dtype not in operands[-1].dtypes:
                return False
            # Everything before has been asked for already: only the dtype in common is left to check.
            return len(operands[-1].dtypes) == 1 or all(
                names.get(desc.type) == dtype
                for desc, operand in zip(described, operands, strict=True)
                if len(operand.dtypes) > 1
            )

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            # The library takes no error from get_workspace_size, but does from here.
            with self._reports():
                self._workspace_bytes(inputs)

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return self._workspace_bytes(inputs)

        def _workspace_bytes(self, inputs: Sequence[Any]) -> int:
            if kernels is None:
                return 0
            return workspace_bytes(kernels, self._call([tensor.desc for tensor in inputs], [t.max for t in inputs]))

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            """Nothing to do: enqueue looks at its shapes."""

        def set_tactic(self, tactic: int) -> None:
            """Nothing to do: there is one."""

        def enqueue(
            self,
            input_descs: Sequence[Any],
            output_descs: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            tensors = (*self._op.inputs, *self._op.outputs)
            descs = (*input_descs, *output_descs)
            with self._reports():
                launch(
                    _there(self._op, kernels),
                    self._call(descs, [desc.dims for desc in descs]),
                    dict(zip((tensor.name for tensor in tensors), (*inputs, *outputs), strict=True)),
                    workspace=workspace,
                    stream=stream,
                )

        def _call(self, descs: Sequence[Any], shapes: Sequence[Any]) -> Call:
            inputs = [names.get(desc.type, str(desc.type)) for desc in descs[: len(self._op.inputs)]]
            return Call(
                op=self._op.name,
                sizes=sizes(self._op, [tuple(shape) for shape in shapes], self._attributes),
                attributes=self._attributes,
                dtype=variable_dtype(self._op, inputs) or "",
            )

    return Plugin
