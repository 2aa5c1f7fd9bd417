"""Counts and ratios, and their distinct forms in JSON.

In Python, ``8`` is a count and ``1.0`` is a ratio. Many JSON writers print 1.0 as 1, so a file contains ``{"count": 8}`` and
``{"ratio": 1.0}``. The meaning then does not depend on how a number is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import HardAttentionError, shown

MOST_COUNT = 2**31 - 1  # positions or steps: the largest int32, more than any model or training has


def is_number(value: Any) -> bool:
    """Return whether ``value`` is an int or a float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_marked(value: Any) -> bool:
    """Return whether ``value`` is ``{"count": ...}`` or ``{"ratio": ...}``."""
    return isinstance(value, Mapping) and len(value) == 1 and next(iter(value)) in ("count", "ratio")


def write_amount(value: Any) -> Any:
    """Return the JSON form of an int (a count) or a float (a ratio); anything else is returned unchanged."""
    if not is_number(value):
        return value
    return {"count" if isinstance(value, int) else "ratio": value}


def read_amount(value: Any, name: str, where: str) -> Any:
    """Return the int of ``{"count": n}`` or the float of ``{"ratio": r}``; anything else is returned unchanged.

    Args:
        name, where: field and place, for the error message.

    Raises:
        HardAttentionError: if a count is not a whole number, or a ratio is not a number in [0, 1].
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
