"""Errors, whose messages name what is wrong, the rule, the place and the remedy."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence

MOST_NAMES = 40  # names listed in an error


class HardAttentionError(ValueError):
    """Raised for a configuration or input that hard attention does not support; the message names the remedy."""


class _Abbreviated(reprlib.Repr):
    """``repr`` that stays short for values of any size and depth, and never raises."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 5
        self.maxstring = self.maxother = self.maxlong = 120

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print integers of more than 4,300 digits.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"<int of {x.bit_length()} bits>"


_ABBREVIATED = _Abbreviated()
MOST_SHOWN = 300  # characters of a value in an error


def shown(value: object) -> str:
    """Return ``repr(value)``, abbreviated to a length that fits into an error message.

    >>> shown(list(range(1000)))
    '[0, 1, 2, 3, 4, ...]'
    """
    try:
        text = _ABBREVIATED.repr(value)
    except Exception:  # noqa: BLE001 - the value is somebody's object, and this is an error message
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def unknown(what: str, name: object, known: Iterable[str], where: str = "", remedy: str = "") -> HardAttentionError:
    """Build the error for a name that does not exist; it lists the known names and suggests the nearest one.

    Args:
        what: kind of thing the name should be. known: the names that exist.
        where: place of the name. remedy: advice if no known name is near.

    >>> print(unknown("estimator", "simpel", ["gumbel", "simple"]))
    unknown estimator 'simpel'; known: 'gumbel', 'simple'. Did you mean 'simple'?
    """
    names = sorted(known)
    place = f" at {shown(where)}" if where else ""
    listed = ", ".join(map(shown, names[:MOST_NAMES])) + (" ..." if len(names) > MOST_NAMES else "")
    message = f"unknown {what} {shown(name)}{place}; {f'known: {listed}' if names else 'there are none'}."
    hint = did_you_mean(name, names) or (f" {remedy}" if remedy else "")
    return HardAttentionError(message + hint)


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return the question that ends an error message and suggests the nearest existing name; empty if none is near."""
    near = difflib.get_close_matches(name, list(names), n=1) if isinstance(name, str) and len(name) < 100 else []
    return f" Did you mean {near[0]!r}?" if near else ""


def some_names(names: Sequence[str]) -> str:
    """Return the names for an error message: all of them, or the first two and the last if there are many."""
    few = ", ".join(map(repr, names[:8] if len(names) <= 8 else names[:2]))
    return few if len(names) <= 8 else f"{few} ... {names[-1]!r}"


def missing_extra(package: str, extra: str, purpose: str) -> ImportError:
    """Build the error for an optional package that is not installed; it names the extra that installs it."""
    return ImportError(f"{purpose} needs the package '{package}'; install it with: pip install 'hf-hardattn[{extra}]'")
