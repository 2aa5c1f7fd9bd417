"""The folder is the registry: a file ``<kind>/<name>.py`` with one class in it is registered under ``name``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from .errors import unknown

KINDS = ("scorers", "estimators", "baselines", "architectures")
BASES = {"scorers": "Scorer", "estimators": "Estimator", "baselines": "Baseline"}  # elsewhere the class is called Base


@cache
def names(kind: str) -> tuple[str, ...]:
    """Names registered under ``kind`` (one of ``KINDS``), sorted; reads the folder, imports no member of it."""
    package = importlib.import_module(f"hf_hardattn.{kind}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


@cache
def load(kind: str, name: str) -> Any:
    """Import and return the member ``name`` of ``kind``: the one class of that file that the folder's base class is a parent of.

    Raises:
        HardAttentionError: no such name; the message lists the names that exist.
    """
    if name not in names(kind):
        raise unknown(kind.removesuffix("s"), name, names(kind))
    package = importlib.import_module(f"hf_hardattn.{kind}")
    module = importlib.import_module(f"hf_hardattn.{kind}.{name}")
    base = getattr(package, BASES.get(kind, "Base"))
    members = [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, base) and member.__module__ == module.__name__
    ]
    if len(members) != 1:
        raise TypeError(f"{module.__name__} must define exactly one {base.__name__}; it defines {len(members)}.")
    return members[0]
