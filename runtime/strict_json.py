"""JSON from files that may be anyone's: UTF-8, no key twice, and of exactly the shape that the reader expects."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Collection
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_SHORT = reprlib.Repr()
_SHORT.maxstring = 256


class DuplicateKeyError(ValueError):
    """A key that stands twice in one object."""


def parse_json(data: bytes, *, constants: bool = False) -> object:
    """Parses JSON more strictly than `json.loads`.

    Args:
        data: the whole text.
        constants: take NaN and Infinity, which Python writes and JSON does not know.

    Raises:
        DuplicateKeyError: a key appears twice in one object.
        ValueError: it is not such JSON.
    """
    refuse = None if constants else _no_constants
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=refuse, parse_int=_integer
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def exact(value: object, names: Collection[str], where: str) -> dict[str, Any]:
    """The value as an object with exactly these keys.

    Raises:
        ValueError: it is none, or a key is missing or unknown; `where` names it in the message.
    """
    fields: dict[str, Any] = typed(value, dict, where)
    if missing := sorted(set(names) - fields.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(fields.keys() - set(names)):
        raise ValueError(f"{where} has the unknown key {_SHORT.repr(unknown[0])}")
    return fields


def typed(value: object, kind: type[T], where: str) -> T:
    """The value, if it is of that type; otherwise a ValueError."""
    # bool is a subclass of int, but `true` is not a number.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {type(value).__name__}, expected {kind.__name__}")
    return value


def positive(value: object, where: str) -> int:
    """The value, if it is a whole number of 1 or more; otherwise a ValueError."""
    number = typed(value, int, where)
    if number < 1:
        raise ValueError(f"{where} is {_SHORT.repr(number)}, expected 1 or more")
    return number


def one_of(value: object, choices: Collection[str], where: str) -> str:
    """The value, if it is one of the choices; otherwise a ValueError."""
    if value not in choices:
        raise ValueError(f"{where} is {_SHORT.repr(value)}, expected one of {', '.join(choices)}")
    return str(value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKeyError(f"the key {_SHORT.repr(twice)} appears twice")
    return result


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # no integer has this sign: what is one here must be one everywhere


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
