"""Run a model soft, masked or gathered inside a block.

A mode applies only to the thread that switched it on. Compiled models run eagerly inside the block.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .errors import HardAttentionError, unknown
from .fields import EXECUTIONS
from .modeling.context import Mode, active
from .modeling.plan import TOWER
from .modeling.selector import Selector
from .unwrapping import unwrap


def all_selectors(model: nn.Module) -> list[Selector]:
    """Return every selector in a model, including the copies for PEFT's other adapters."""
    return [module for module in unwrap(model).modules() if isinstance(module, Selector)]


def selectors_or_refuse(model: nn.Module) -> list[Selector]:
    """Return every selector in a model.

    Raises:
        HardAttentionError: if there is none, since the requested change would have no effect.
    """
    found = all_selectors(model)
    if not found:
        raise HardAttentionError(
            f"{type(unwrap(model)).__name__} has no hard-attention sites; load it with hard_attention=... or call apply()."
        )
    return found


def named_selectors(model: nn.Module) -> list[tuple[str, Selector, bool]]:
    """Return the site of every selector in a model, the selector, and whether it is active. PEFT's copies of one selector share a name.

    A model that was attached as a whole has numbered its towers already. If a container holds several models, the second tower of a name
    is numbered here in the same way: ``vision2.inputs``. The modules are walked only once, since every training step does so.
    """
    found: list[tuple[str, Selector, bool]] = []
    towers: dict[str, str] = {}  # from name to the path prefix of its modules
    idle: set[int] = set()
    for path, module in unwrap(model).named_modules():
        if isinstance(module, Selector):
            tower = next((name for name in reversed(towers) if path.startswith(towers[name])), None)
            site = module.site if tower is None else f"{tower}.{module.site.split('.', 1)[1]}"
            found.append((site, module, id(module) not in idle))
        elif TOWER in module.__dict__:
            towers[_free_name(module.__dict__[TOWER].name, towers)] = f"{path}." if path else ""
        elif isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            idle |= _idle(module)  # PEFT's wrapper comes before the modules it wraps
    return found


def _idle(wrapper: Any) -> set[int]:
    """Return the ids of inactive modules in PEFT's wrapper: the copies for other adapters, and the original if a copy is active."""
    active = [] if wrapper.disable_adapters else [n for n in wrapper.active_adapters if n in wrapper.modules_to_save]
    idle = {id(module) for name, module in wrapper.modules_to_save.items() if name not in active}
    return idle | {id(wrapper.original_module)} if active else idle


def site_names(model: nn.Module) -> dict[int, str]:
    """Return the site of every selector in a model, keyed by the selector's id; PEFT's copies of one selector share a name."""
    return {id(selector): site for site, selector, _ in named_selectors(model)}


def sites_or_refuse(model: nn.Module) -> dict[int, str]:
    """Return ``site_names``, but refuse a model without sites, see ``selectors_or_refuse``."""
    selectors_or_refuse(model)
    return site_names(model)


def _free_name(name: str, taken: Collection[str]) -> str:
    """Return ``name``, followed by the first free number if it is taken."""
    kind = name.rstrip("0123456789")
    numbered = (f"{kind}{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


@contextmanager
def soft(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model with full attention inside the block: no site selects, and the weights stay the same."""
    with active(Mode(site_names(model), soft=True)):
        yield model


@contextmanager
def sampled(model: nn.Module) -> Iterator[nn.Module]:
    """Sample the selections inside the block, with the settings at the end of training; the rest of the model stays in its mode.

    In evaluation mode, a site makes the most likely choice. The mean of the predictions over several draws is the Monte Carlo estimate of
    the model's expected prediction. Estimators that draw nothing (``sample=False``) choose as usual.

    Raises:
        HardAttentionError: if the model has no sites.
    """
    with active(Mode(sites_or_refuse(model), sampled=True)):
        yield model


@contextmanager
def execution(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """Run every site ``masked`` or ``gathered`` inside the block.

    Raises:
        HardAttentionError: if the mode is unknown, or the model has no sites.
    """
    if mode not in EXECUTIONS:
        raise unknown("execution", mode, EXECUTIONS)
    with active(Mode(sites_or_refuse(model), execution=mode)):
        yield model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into evaluation mode inside the block, and restore the mode of every module after it."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in before:
            module.training = training
