"""Loads TensorRT or TensorRT-RTX once per process: the module, its logger, and our plugins in its registry.

Both libraries have the same Python API, so everything downstream takes a Library and never asks which one it is, except
where the two really differ.
"""

# mypy: allow-subclassing-any
# (TensorRT comes without types.)

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm_export.plugins.library import rtx_name_library
from glm_export.plugins.tensorrt.registry import register
from glm_export.runtime.errors import BackendError, missing_library

if TYPE_CHECKING:
    from types import ModuleType

_log = logging.getLogger("glm_export.tensorrt")

MAX_ERRORS = 100
"""Messages that are kept until somebody takes them; a broken build repeats itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What a target imports: versions from `oldest`, of the same major version."""

    module: str
    oldest: tuple[int, int]


_SOURCES = {
    "tensorrt": _Source(module="tensorrt", oldest=(11, 0)),
    "tensorrt-rtx": _Source(module="tensorrt_rtx", oldest=(1, 7)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A loaded library, ready to parse, build and run networks with our plugins."""

    target: str
    module: Any
    """The Python module `tensorrt` or `tensorrt_rtx`."""
    logger: Any
    """The process's only ILogger of this library. `take_errors() -> list[str]` returns and forgets its errors."""

    @property
    def version(self) -> str:
        """As the library says it, e.g. 1.7.1.116."""
        version: str = self.module.__version__
        return version

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds without a GPU for the compute capabilities it is told."""
        return self.target == "tensorrt-rtx"


@functools.cache
def load_library(target: str) -> Library:
    """The library of a target; the same object at every call.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.

    Raises:
        BackendError: the library is not installed, does not load, is of another version, or refuses our plugins.
    """
    source = _SOURCES[target]
    if importlib.util.find_spec(source.module) is None:
        raise missing_library(f"The target {target}", source.module, extra=target)
    try:
        module = importlib.import_module(source.module)
    except (ImportError, OSError) as error:
        raise BackendError(
            f"The library {source.module} does not load ({error}): "
            f'pip install --force-reinstall "glm-export[{target}]".'
        ) from error
    _check_version(module, source, target)
    if target == "tensorrt-rtx":
        _name_rtx()
    library = Library(target=target, module=module, logger=_make_logger(module))
    try:
        register(module, library.logger)
    except (RuntimeError, OSError) as error:
        reasons = " ".join([str(error), *library.logger.take_errors()])
        raise BackendError(
            f"{source.module} {library.version} refuses the plugins ({reasons}): install glm-export again."
        ) from error
    return library


def _check_version(module: ModuleType, source: _Source, target: str) -> None:
    seen = tuple(int(part) for part in module.__version__.split(".")[:2])
    if seen[0] != source.oldest[0] or seen < source.oldest:
        major, minor = source.oldest
        raise BackendError(
            f"The target {target} needs {source.module} {major}.{minor} or a newer {major}.x, found "
            f'{module.__version__}: pip install "glm-export[{target}]".'
        )


def _name_rtx() -> None:
    """Makes the name `libtensorrt_rtx.so` known to the dynamic loader.

    The ONNX parser opens that name when it adds a plugin layer. The wheel only has `libtensorrt_rtx.so.1`, and what is
    not found ends the process. Ours is an empty library of that name which needs the loaded one.
    """
    stub = rtx_name_library()
    if stub is None:
        raise BackendError(
            "glm-export was installed without its compiled parts, which the target tensorrt-rtx needs: install it "
            "again, with a C++ compiler."
        )
    ctypes.CDLL(str(stub))


def _make_logger(module: Any) -> Any:
    class Logger(module.ILogger):
        """Keeps errors for those who explain a failure; everything else goes to Python's logging."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._errors: list[str] = []
            severity = module.ILogger.Severity
            self._levels = {severity.WARNING: logging.INFO}
            self._failures = (severity.INTERNAL_ERROR, severity.ERROR)

        def log(self, severity: Any, message: str) -> None:
            if severity in self._failures and len(self._errors) < MAX_ERRORS:
                self._errors.append(message)
            _log.log(self._levels.get(severity, logging.DEBUG), "%s", message)

        def take_errors(self) -> list[str]:
            errors, self._errors = self._errors, []
            return errors

    return Logger()
