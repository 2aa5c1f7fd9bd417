"""The ``sites`` of a configuration: globs and their overrides."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from .amounts import is_marked, is_number
from .errors import HardAttentionError, shown
from .fields import read_field

MOST_GLOB = 500  # characters


def read_sites(sites: Any) -> dict[str, dict[str, Any]] | None:
    """Return globs and their overrides in the form that a configuration stores.

    Args:
        sites: None, a glob, a collection of globs, or a dict from glob to overrides, just a budget, or None.

    Raises:
        HardAttentionError: if it is none of these or empty, a glob is not a string, or a field is invalid.
    """
    if sites is None:
        return None
    if isinstance(sites, str):
        sites = [sites]
    if not isinstance(sites, (Mapping, list, tuple, Set)):
        raise HardAttentionError(
            f"sites={shown(sites)} does not name sites; use a glob, a list of globs, or a dict from globs to overrides."
        )
    if not sites:
        raise HardAttentionError("sites is empty; name at least one site, or use None for the recommended ones.")
    read = {}
    for pattern in sites:
        if not isinstance(pattern, str) or not 0 < len(pattern) <= MOST_GLOB:
            raise HardAttentionError(
                f"sites contains {shown(pattern)}; a glob is a string of 1 to {MOST_GLOB} characters, such as 'vision.tokens.*'."
            )
        read[pattern] = _read_overrides(sites[pattern] if isinstance(sites, Mapping) else None, pattern)
    return read


def _read_overrides(overrides: Any, pattern: str) -> dict[str, Any]:
    if overrides is None:
        return {}
    if is_number(overrides) or isinstance(overrides, str) or is_marked(overrides):
        overrides = {"budget": overrides}
    if not isinstance(overrides, Mapping):
        raise HardAttentionError(
            f"sites maps {shown(pattern)} to {shown(overrides)}; use a dict of fields, or a budget: a count, a ratio or a string."
        )
    if overrides.keys() & {"start", "sample"} and "budget" not in overrides:
        overrides = {"budget": overrides}  # just a schedule or a range
    return {name: read_field(name, value, pattern) for name, value in overrides.items()}
