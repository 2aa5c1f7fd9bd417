"""The families of models: one file each, a row of names; the file name is the family's."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from torch import nn

from ..modeling.family import Family
from ..modeling.spec import ModelSpec


@functools.cache
def names() -> tuple[str, ...]:
    """Names of the families, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


@functools.cache
def load(name: str) -> Family:
    """The family called ``name``."""
    module = importlib.import_module(f"{__name__}.{name}")
    (spec,) = (value for value in vars(module).values() if isinstance(value, ModelSpec))
    return Family(spec)


def family_of(model: nn.Module) -> Family | None:
    """The family that knows ``model``, or a model inside it; None when there is none."""
    families = [load(name) for name in names()]
    owner = next((family for family in families if family.owns(model) and family.towers(model)), None)
    return owner or next((family for family in families if family.towers(model)), None)
