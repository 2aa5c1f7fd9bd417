"""The arguments of a module's ``forward`` by name, so that hooks can read and replace them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of ``forward``'s parameters in order, ``**kwargs`` left out; read once, when a model is attached."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    named = (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return tuple(named)[1:]


def takes_keywords(module: nn.Module) -> bool:
    """Whether ``forward`` accepts keywords that it does not name."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def given(names: tuple[str, ...], args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """The value given under ``name`` in a call of a forward with the parameters ``names``, or None."""
    if name in kwargs:
        return kwargs[name]
    if not args or name not in names:
        return None
    index = names.index(name)
    return args[index] if index < len(args) else None


class Arguments:
    """The arguments of one call.

    Positional arguments stay positional: reentrant gradient checkpointing follows only those.
    """

    __slots__ = ("names", "values", "keywords")

    def __init__(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.names, self.values, self.keywords = names, list(args), dict(kwargs)

    def get(self, name: str) -> Any:
        """The value given under ``name``, or None."""
        return given(self.names, self.values, self.keywords, name)

    def set(self, name: str, value: Any) -> None:
        """Give ``value`` under ``name``, where it was given before or as a keyword."""
        index = self._index(name)
        if name not in self.keywords and index < len(self.values):
            self.values[index] = value
        else:
            self.keywords[name] = value

    def result(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a forward pre-hook returns."""
        return tuple(self.values), self.keywords

    def _index(self, name: str) -> int:
        return self.names.index(name) if name in self.names else len(self.values)
