"""JSON from files that may be anyone's: UTF-8, and no key twice, of which every reader would pick its own."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn


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
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKeyError(f"the key {twice!r} appears twice")
    return result


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
