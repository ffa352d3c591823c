"""What the CPU kernels of this process have done so far."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Self

from glm_export.plugins.library import cpu_library


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Sums over all sessions; what happened between two moments is the difference."""

    seconds: float
    """In kernels."""
    experts: int
    """Whose weights were needed: each counts once per layer and step, however many tokens chose it."""

    @classmethod
    def so_far(cls) -> Self:
        """The sums at this moment.

        Raises:
            FileNotFoundError: the CPU kernels are not built.
        """
        nanoseconds, experts = ctypes.c_uint64(), ctypes.c_uint64()
        _library().glm_work(ctypes.byref(nanoseconds), ctypes.byref(experts))
        return cls(seconds=nanoseconds.value * 1e-9, experts=experts.value)

    def __sub__(self, before: Work) -> Work:
        return Work(seconds=self.seconds - before.seconds, experts=self.experts - before.experts)


@functools.cache
def _library() -> ctypes.CDLL:
    path = cpu_library()
    if path is None:
        raise FileNotFoundError("the CPU kernels are not built")
    library = ctypes.CDLL(str(path))
    library.glm_work.argtypes = [ctypes.POINTER(ctypes.c_uint64)] * 2
    library.glm_work.restype = None
    return library
