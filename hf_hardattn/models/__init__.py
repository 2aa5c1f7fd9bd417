"""The families of models: one file each, a row of names; the file name is the family's."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from torch import nn

from ..modeling.family import FAMILY, Family
from ..modeling.spec import ModelSpec, TowerSpec

# plain data, not functools.cache: Dynamo traces a training loss that asks for the family, and would run what is cached again
_names = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))
_loaded: dict[str, Family] = {}


def names() -> tuple[str, ...]:
    """Names of the families, sorted."""
    return _names


def load(name: str) -> Family:
    """The family called ``name``."""
    if name not in _loaded:
        module = importlib.import_module(f"{__name__}.{name}")
        (spec,) = (value for value in vars(module).values() if isinstance(value, ModelSpec))
        _loaded[name] = Family(spec)
    return _loaded[name]


def family_of(model: nn.Module) -> Family | None:
    """The family that knows ``model``, or a model inside it; None when there is none."""
    known = model.__dict__.get(FAMILY)
    if known is not None:
        return load(known)
    families = [load(name) for name in names()]
    owner = next((family for family in families if family.owns(model) and family.towers(model)), None)
    return owner or next((family for family in families if family.towers(model)), None)


def towers_inside(model: nn.Module, paths: Mapping[str, str]) -> dict[str, tuple[TowerSpec, nn.Module]]:
    """The towers of a model that is made of others, each with the row of its own family.

    Args:
        paths: name of the tower to the path of the model that it is in.
    """
    found = {}
    for name, path in paths.items():
        part = model.get_submodule(path)
        owner = next((family for family in map(load, names()) if family.owns(part)), None)
        towers = {} if owner is None else owner.towers(part)
        if name in towers:
            found[name] = towers[name].spec, towers[name].module
    return found
