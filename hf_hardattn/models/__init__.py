"""The families of models. Each has one file, named after it, with a row of names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from torch import nn

from ..modeling.family import FAMILY, Family
from ..modeling.spec import ModelSpec, TowerSpec

# plain data, not functools.cache: Dynamo traces a training loss that looks up the family, and would run a cached function again
_names = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))
_loaded: dict[str, Family] = {}


def names() -> tuple[str, ...]:
    """Return the names of the families, sorted."""
    return _names


def load(name: str) -> Family:
    """Return the family called ``name``."""
    if name not in _loaded:
        module = importlib.import_module(f"{__name__}.{name}")
        (spec,) = (value for value in vars(module).values() if isinstance(value, ModelSpec))
        _loaded[name] = Family(spec)
    return _loaded[name]


def family_of(model: nn.Module) -> Family | None:
    """Return the family that knows ``model``, or a model inside it; None if there is none."""
    known = model.__dict__.get(FAMILY)
    if known is not None:
        return load(known)
    families = [load(name) for name in names()]
    owner = next((family for family in families if family.owns(model) and family.towers(model)), None)
    return owner or next((family for family in families if family.towers(model)), None)


def why_unknown(model: nn.Module) -> str:
    """Return why no family knows ``model``, to complete a sentence of an error."""
    known = next((name for name in names() if load(name).knows_as_encoder(model)), None)
    if known is None:
        return f"supported families: {', '.join(names())}"
    return f"family '{known}' supports it as an encoder, with is_decoder=False in its config"


def towers_inside(model: nn.Module, paths: Mapping[str, str]) -> dict[str, tuple[TowerSpec, nn.Module]]:
    """Return the towers of a model that consists of other models, each with the row of its own family.

    Args:
        paths: dict from tower name to the path of the model that contains the tower.
    """
    found = {}
    for name, path in paths.items():
        part = model.get_submodule(path)
        owner = next((family for family in map(load, names()) if family.owns(part)), None)
        towers = {} if owner is None else owner.towers(part)
        if name in towers:
            found[name] = towers[name].spec, towers[name].module
    return found
