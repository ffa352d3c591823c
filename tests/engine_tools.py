"""What tests of TensorRT engines share."""

from collections.abc import Callable

from glm_export.exporter.recipe import Engine
from glm_export.exporter.tensorrt.builder import EngineChoices
from glm_export.runtime.bundle import Bundle

EngineOf = Callable[..., Bundle]
"""(precision, cache dtype) -> a bundle with an engine."""


def rtx(**engine: object) -> EngineChoices:
    """For TensorRT-RTX, which builds without a GPU: 2 rows of 64 tokens, 16 at a time."""
    return EngineChoices(target="tensorrt-rtx", batch=2, capacity=64, engine=Engine(prefill=16, **engine))
