"""Registry of scorers, estimators and baselines: the files of their folders, and plug-ins.

A file ``<kind>/<name>.py`` with one class in it is registered under ``name``. A plug-in is registered by ``register``, or by an
entry point of an installed package, whose name is ``<kind>.<name>``::

    [project.entry-points."hf_hardattn.plugins"]
    "estimator.mine" = "my_package.estimators:Mine"

Reading the names imports none of the classes; ``load`` imports the requested one.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import HardAttentionError, shown, unknown

KINDS = ("scorers", "estimators", "baselines")
BASES = {"scorers": "Scorer", "estimators": "Estimator", "baselines": "Baseline"}
GROUP = "hf_hardattn.plugins"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_\-]{0,99}")
_registered: dict[tuple[str, str], type] = {}


def register(kind: str, name: str, member: type, *, overwrite: bool = False) -> None:
    """Register your own class under a name, for configurations, command lines and ``hf-hardattn list``.

    A saved model refers to its plug-ins by name, so register them before it is loaded.

    Args:
        kind: ``"scorer"``, ``"estimator"`` or ``"baseline"``.
        name: letters, digits, ``_`` and ``-``; begins with a letter.
        member: subclass of ``hf_hardattn.scorers.Scorer``, ``estimators.Estimator`` or ``baselines.Baseline``. The annotations of its
            constructor declare its options, see ``hf_hardattn.options``.
        overwrite: replace a class that already has this name, even a built-in one.

    Raises:
        HardAttentionError: if the kind, the name or the class is invalid, or the name is taken.

    Examples:
        >>> class Middle(hf_hardattn.scorers.Scorer): ...                                     # doctest: +SKIP
        >>> hf_hardattn.register("scorer", "middle", Middle)                                  # doctest: +SKIP
    """
    kind = _plural(kind)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise HardAttentionError(
            f"{shown(name)} is not a valid name for a plug-in; use at most 100 letters, digits, '_' and '-', with a letter first."
        )
    _check_member(kind, name, member)
    if name in names(kind) and not overwrite and _registered.get((kind, name)) is not member:
        raise HardAttentionError(
            f"{kind[:-1]} {name!r} is already registered; a name stands for one class. Use another name, or overwrite=True."
        )
    _registered[kind, name] = member


def names(kind: str) -> tuple[str, ...]:
    """Return the names registered under ``kind`` (one of ``KINDS``), sorted, without importing the classes."""
    plugins = {name for group, name in (*_registered, *_entry_points()) if group == kind}
    return tuple(sorted(plugins.union(_built_in(kind))))


def load(kind: str, name: str) -> Any:
    """Return the class that is registered as ``name``; import it if it has not been imported yet.

    Raises:
        HardAttentionError: if the name is unknown (the message lists the known ones), or a plug-in cannot be imported or is not such a
            class.
    """
    if isinstance(name, str):
        if (kind, name) in _registered:  # first: it may have overwritten a built-in
            return _registered[kind, name]
        if name in _built_in(kind):
            return _load_built_in(kind, name)
        if (kind, name) in _entry_points():
            return _load_plugin(kind, name)
    remedy = f"Register a plug-in first: hf_hardattn.register({kind[:-1]!r}, name, class)." if kind in BASES else ""
    raise unknown(kind.removesuffix("s"), name, names(kind), remedy=remedy)


@cache
def _built_in(kind: str) -> tuple[str, ...]:
    package = importlib.import_module(f"hf_hardattn.{kind}")
    return tuple(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


@cache
def _load_built_in(kind: str, name: str) -> Any:
    """Return the one class of the file that derives from the folder's base class."""
    module = importlib.import_module(f"hf_hardattn.{kind}.{name}")
    base = _base(kind)
    members = [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, base) and member.__module__ == module.__name__
    ]
    if len(members) != 1:
        raise TypeError(f"{module.__name__} must define exactly one {base.__name__}; it defines {len(members)}.")
    return members[0]


@cache
def _entry_points() -> dict[tuple[str, str], EntryPoint]:
    """Return the plug-ins of installed packages by kind and name. Invalid entry points are skipped with a warning."""
    found: dict[tuple[str, str], EntryPoint] = {}
    for point in entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        plural = f"{kind.removesuffix('s')}s"
        problem = ""
        if plural not in BASES or not _NAME.fullmatch(name):
            problem = f"its name is not '<kind>.<name>' with a kind of {', '.join(sorted(BASES))}"
        elif name in _built_in(plural):
            problem = f"{plural[:-1]} '{name}' is built in"
        elif (plural, name) in found and found[plural, name].value != point.value:
            problem = f"'{found[plural, name].value}' has the same name"
        if problem:
            warnings.warn(
                f"the entry point '{point.name} = {point.value}' of {GROUP} is ignored: {problem}.", stacklevel=2
            )
        else:
            found[plural, name] = point
    return found


@cache
def _load_plugin(kind: str, name: str) -> Any:
    point = _entry_points()[kind, name]
    place = f"{kind[:-1]} {name!r}, the entry point '{point.value}',"
    try:
        member = point.load()
    except Exception as error:  # noqa: BLE001 - somebody else's module may raise anything
        text = " ".join(str(error).split())[:300]
        raise HardAttentionError(
            f"{place} cannot be imported ({type(error).__name__}: {text}). Fix or uninstall the package that provides it."
        ) from error
    _check_member(kind, name, member)
    return member


def _plural(kind: Any) -> str:
    """Return ``"scorers"`` for ``"scorer"`` or ``"scorers"``."""
    plural = f"{kind.removesuffix('s')}s" if isinstance(kind, str) else ""
    if plural not in BASES:
        raise unknown("kind of plug-in", kind, (known[:-1] for known in BASES))
    return plural


def _base(kind: str) -> type:
    base: type = getattr(importlib.import_module(f"hf_hardattn.{kind}"), BASES.get(kind, "Base"))
    return base


def _check_member(kind: str, name: str, member: Any) -> None:
    """Raise ``HardAttentionError`` unless ``member`` is a class that can serve as ``kind``."""
    base = _base(kind)
    if not inspect.isclass(member) or not issubclass(member, base) or member is base:
        raise HardAttentionError(
            f"{shown(member)} cannot be used as {kind[:-1]} {name!r}; it must be a subclass of hf_hardattn.{kind}.{base.__name__}."
        )
    if kind != "estimators":
        return
    known = importlib.import_module("hf_hardattn.estimators").NEEDS
    needs = getattr(member, "needs", None)
    if not isinstance(getattr(member, "biased", None), bool):
        raise HardAttentionError(
            f"estimator {name!r} does not say whether it is biased; {member.__name__} needs a class attribute biased = True or False."
        )
    if not isinstance(needs, tuple) or not set(needs) <= set(known):
        raise HardAttentionError(
            f"needs={shown(needs)} of estimator {name!r} is not valid; it must be a tuple of {', '.join(map(repr, known))}."
        )
