"""Counts and ratios, told apart in JSON.

In Python ``8`` is a count and ``1.0`` a ratio. Many JSON writers print 1.0 as 1, so a file says ``{"count": 8}`` and
``{"ratio": 1.0}``: what prints a number otherwise does not change what it means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import HardAttentionError, shown

MOST_COUNT = 2**31 - 1  # positions or steps: what fits into int32, and more than any model or training has


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or a float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_marked(value: Any) -> bool:
    """Whether ``value`` is ``{"count": ...}`` or ``{"ratio": ...}``."""
    return isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in ("count", "ratio")


def write_amount(value: Any) -> Any:
    """Return the JSON form of an int (a count) or a float (a ratio); anything else as it is."""
    if not is_number(value):
        return value
    return {"count" if isinstance(value, int) else "ratio": value}


def read_amount(value: Any, name: str, where: str) -> Any:
    """Return the int of ``{"count": n}`` or the float of ``{"ratio": r}``; anything else as it is.

    Args:
        name, where: field and place, for the error.

    Raises:
        HardAttentionError: a count that is not a whole number, a ratio that is not a number in [0, 1].
    """
    if not is_marked(value):
        return value
    ((kind, number),) = value.items()
    if kind == "count" and is_number(number) and abs(number) <= MOST_COUNT and number == int(number):
        return int(number)
    if kind == "ratio" and is_number(number) and 0 <= number <= 1:
        return float(number)
    raise HardAttentionError(
        f"{name}={shown(value)} is out of range at {shown(where)}; a count is an int up to {MOST_COUNT}, a ratio a number in "
        '[0, 1]. Write {"count": 8} or {"ratio": 0.5}.'
    )
