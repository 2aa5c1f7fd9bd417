"""Errors: what is wrong, the rule, the place, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HardAttentionError(ValueError):
    """A configuration or input that hard attention cannot honour; the message names the remedy."""


def unknown(what: str, name: object, known: Iterable[str], where: str = "") -> HardAttentionError:
    """Build the error for a name that does not exist, with the names that do and the nearest one.

    >>> print(unknown("estimator", "simpel", ["gumbel", "simple"]))
    unknown estimator 'simpel'; known: 'gumbel', 'simple'. Did you mean 'simple'?
    """
    names = sorted(known)
    place = f" at '{where}'" if where else ""
    message = f"unknown {what} {name!r}{place}; known: {', '.join(map(repr, names))}."
    near = difflib.get_close_matches(str(name), names, n=1)
    return HardAttentionError(message + (f" Did you mean {near[0]!r}?" if near else ""))


def missing_extra(package: str, extra: str, purpose: str) -> ImportError:
    """Build the error for an optional package that is not installed; it names the extra that brings it."""
    return ImportError(f"{purpose} needs the package '{package}'; install it with: pip install 'hf-hardattn[{extra}]'")
