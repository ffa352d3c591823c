"""Puts our plugins into TensorRT's registry: the compiled library where it was built, else the ones in Python."""

from __future__ import annotations

from typing import Any

from glm_export.plugins.cuda.api import CudaKernels
from glm_export.plugins.library import cuda_library, tensorrt_plugin_library
from glm_export.plugins.ops import TENSORRT_PLUGINS
from glm_export.plugins.schema import DOMAIN, VERSION
from glm_export.plugins.tensorrt.plugin import creators


def register(module: Any, logger: Any) -> None:
    """Registers the plugins unless they are there; a second call changes nothing.

    Args:
        module: tensorrt or tensorrt_rtx.
        logger: an ILogger, which is told what is wrong with a node or a plan.

    Raises:
        RuntimeError: the registry refused one.
        OSError: the CUDA kernels are there, but do not load.
    """
    if not registered(module):
        registry, compiled = module.get_plugin_registry(), tensorrt_plugin_library()
        if compiled is not None:
            registry.load_library(str(compiled))
        else:
            kernels = None if cuda_library() is None else CudaKernels()
            for creator in creators(module, logger, kernels):
                registry.register_creator(creator, DOMAIN)
    if missing := set(TENSORRT_PLUGINS) - registered(module):
        raise RuntimeError(f"The plugins {', '.join(sorted(missing))} could not be registered.")


def registered(module: Any) -> set[str]:
    """The names of our plugins in the registry."""
    return {
        creator.name
        for creator in module.get_plugin_registry().all_creators
        if (creator.plugin_namespace, creator.plugin_version) == (DOMAIN, str(VERSION))
    }
