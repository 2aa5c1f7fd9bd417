"""The arguments of a module's ``forward`` by name, so that hooks can read and replace them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of ``forward``'s parameters in order, without ``**kwargs``; read once, when a model is attached."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    named = (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return tuple(named)[1:]


def takes_keywords(module: nn.Module) -> bool:
    """Return whether ``forward`` accepts keywords that it does not name."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def given(names: tuple[str, ...], args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """Return the value passed for ``name`` in a call of a ``forward`` with the parameters ``names``, or None."""
    if name in kwargs:
        return kwargs[name]
    if not args or name not in names:
        return None
    index = names.index(name)
    return args[index] if index < len(args) else None


class Arguments:
    """The arguments of one call.

    Positional arguments stay positional, because reentrant gradient checkpointing tracks only those.
    """

    __slots__ = ("names", "values", "keywords")

    def __init__(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.names, self.values, self.keywords = names, list(args), dict(kwargs)

    def get(self, name: str) -> Any:
        """Return the value passed for ``name``, or None."""
        return given(self.names, self.values, self.keywords, name)

    def set(self, name: str, value: Any) -> None:
        """Set the argument ``name``: in its position if it was passed by position, otherwise as a keyword."""
        index = self._index(name)
        if name not in self.keywords and index < len(self.values):
            self.values[index] = value
        else:
            self.keywords[name] = value

    def result(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments in the form that a forward pre-hook returns."""
        return tuple(self.values), self.keywords

    def _index(self, name: str) -> int:
        return self.names.index(name) if name in self.names else len(self.values)
