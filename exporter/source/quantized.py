"""How the FP8 weights of a checkpoint are scaled: every vendor stores E4M3 values beside scales to multiply them with.

What differs is which elements share a scale (`Scheme`) and which linears are quantized at all (`Quantization`). How the
vendors spell it is read in quantization_config.py.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_export.runtime.errors import InputError

PER_TOKEN = "dynamically per token"
"""How our own fp8 quantizes activations, whatever the checkpoint was made for."""

_PATTERN_SECONDS = 2.0  # real patterns take some milliseconds for all modules together


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """Which elements of a weight [O, I] share a scale: blocks of `rows` x `columns`, where None is the whole extent."""

    rows: int | None
    columns: int | None
    activations: str = PER_TOKEN
    """How the checkpoint wants the inputs to be quantized."""

    def __str__(self) -> str:
        if self.columns is not None:
            return f"in blocks of {self.rows}x{self.columns}"
        return "per tensor" if self.rows is None else "per channel"

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many scales a weight of this shape has along each axis."""
        return (-(-shape[0] // (self.rows or shape[0])), -(-shape[1] // (self.columns or shape[1])))

    def fits(self, stored: tuple[int, ...], shape: tuple[int, int]) -> bool:
        """Whether scales stored in this shape are those of a weight; writers differ in which axes of length 1 stay."""
        return [n for n in stored if n != 1] == [n for n in self.grid(shape) if n != 1]

    def row_scaled(self, shape: tuple[int, int]) -> bool:
        """Whether all elements of a row share a scale, as in our own fp8."""
        return self.grid(shape)[1] == 1

    def of_rows(self, scale: Tensor, start: int, stop: int, shape: tuple[int, int]) -> Tensor:
        """The scales [stop - start, 1 or I] float32 of the rows start..stop of a weight of this shape."""
        rows = torch.arange(start, stop) // (self.rows or shape[0])
        grid = scale.view(self.grid(shape)).float()[rows]
        if self.row_scaled(shape):
            return grid
        assert self.columns is not None
        return grid.repeat_interleave(self.columns, dim=1)[:, : shape[1]]


class Names:
    """A set of module names.

    Args:
        names: members.
        patterns: regular expressions that match members from the start.
        branches: whether a name stands for all modules below it too, and for all that end with it.
        every: whether all names are members.
    """

    def __init__(
        self, names: Collection[str] = (), patterns: Iterable[str] = (), *, branches: bool = False, every: bool = False
    ) -> None:
        self._every = every
        self._names = frozenset(names)
        self._endings = tuple(names) if branches else ()
        self._pattern = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or "(?!)")
        self._seconds = 0.0

    def __contains__(self, name: str) -> bool:
        """Whether a module name is a member.

        Raises:
            InputError: a hostile pattern takes too long.
        """
        if self._every or name in self._names:
            return True
        if self._endings and (
            name.endswith(self._endings)
            or not self._names.isdisjoint(itertools.accumulate(name.split("."), "{}.{}".format))
        ):
            return True
        started = time.perf_counter()
        found = self._pattern.match(name) is not None
        self._seconds += time.perf_counter() - started
        if self._seconds > _PATTERN_SECONDS:
            raise InputError("quantization_config has patterns that take too long to match; write the names out.")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """Which linears of a checkpoint are quantized, and how."""

    method: str
    """As config.json calls it."""
    groups: tuple[tuple[Names, Scheme], ...]
    """The first that has a linear counts."""
    ignored: Names

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a linear, None if it is not quantized; raises as `Names`."""
        if module in self.ignored:
            return None
        return next((scheme for names, scheme in self.groups if module in names), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingError:
    """What re-quantizing did to weights, as relative L2: of the worst block of a matrix, and of all together."""

    worst: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @classmethod
    def of(cls, source: Tensor, values: Tensor, scale: Tensor) -> RoundingError:
        """Of one block.

        Args:
            source: [..., I] float32, what the checkpoint's FP8 stands for.
            values: [..., I] float8_e4m3fn, what is stored instead.
            scale: [...] float32, their row scales.
        """
        error = float(torch.linalg.vector_norm(values.float() * scale[..., None] - source, dtype=torch.float64))
        norm = float(torch.linalg.vector_norm(source, dtype=torch.float64))
        return cls(worst=error / norm if norm else 0.0, squared_error=error**2, squared_norm=norm**2)

    def __add__(self, other: RoundingError) -> RoundingError:
        return RoundingError(
            worst=max(self.worst, other.worst),
            squared_error=self.squared_error + other.squared_error,
            squared_norm=self.squared_norm + other.squared_norm,
        )

    @property
    def overall(self) -> float:
        """The relative L2 of everything added up."""
        return float((self.squared_error / self.squared_norm) ** 0.5) if self.squared_norm else 0.0
