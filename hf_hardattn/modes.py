"""Run a model soft, masked or gathered inside a block.

Modes belong to the thread that switched them on. Compiled models run eagerly inside the block.
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
    """Every selector in a model, the copies of PEFT's other adapters too."""
    return [module for module in unwrap(model).modules() if isinstance(module, Selector)]


def selectors_or_refuse(model: nn.Module) -> list[Selector]:
    """Every selector in a model.

    Raises:
        HardAttentionError: there is none, so that what was asked for would change nothing.
    """
    found = all_selectors(model)
    if not found:
        raise HardAttentionError(
            f"{type(unwrap(model)).__name__} has no hard-attention sites; load it with hard_attention=... or call apply()."
        )
    return found


def named_selectors(model: nn.Module) -> list[tuple[str, Selector, bool]]:
    """The site of every selector in a model, the selector, and whether it runs now: PEFT's copies of one selector share a name.

    A model attached as a whole numbers its towers of one kind itself. Where several models stand in one container, the second
    tower of a name is numbered here in the same way: ``vision2.inputs``. One walk, since every training step takes it.
    """
    found: list[tuple[str, Selector, bool]] = []
    towers: dict[str, str] = {}  # name to the path before its modules
    idle: set[int] = set()
    for path, module in unwrap(model).named_modules():
        if isinstance(module, Selector):
            tower = next((name for name in reversed(towers) if path.startswith(towers[name])), None)
            site = module.site if tower is None else f"{tower}.{module.site.split('.', 1)[1]}"
            found.append((site, module, id(module) not in idle))
        elif TOWER in module.__dict__:
            towers[_free_name(module.__dict__[TOWER].name, towers)] = f"{path}." if path else ""
        elif isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            idle |= _idle(module)  # PEFT's wrapper comes before what it wraps
    return found


def _idle(wrapper: Any) -> set[int]:
    """Ids of the modules in PEFT's wrapper that do not run now: the copies of other adapters, and the original beside an active one."""
    active = [] if wrapper.disable_adapters else [n for n in wrapper.active_adapters if n in wrapper.modules_to_save]
    idle = {id(module) for name, module in wrapper.modules_to_save.items() if name not in active}
    return idle | {id(wrapper.original_module)} if active else idle


def site_names(model: nn.Module) -> dict[int, str]:
    """The site of every selector in a model, by the selector's id; PEFT's copies of one selector share a name."""
    return {id(selector): site for site, selector, _ in named_selectors(model)}


def sites_or_refuse(model: nn.Module) -> dict[int, str]:
    """As ``site_names``; a model without sites is refused, see ``selectors_or_refuse``."""
    selectors_or_refuse(model)
    return site_names(model)


def _free_name(name: str, taken: Collection[str]) -> str:
    """``name``, or with the first number that is not taken."""
    kind = name.rstrip("0123456789")
    numbered = (f"{kind}{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


@contextmanager
def soft(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model with full attention inside the block: no site selects, and the weights stay."""
    with active(Mode(site_names(model), soft=True)):
        yield model


@contextmanager
def sampled(model: nn.Module) -> Iterator[nn.Module]:
    """Sample the selections inside the block, by the law that the training ends with; the rest of the model stays in its mode.

    In evaluation mode a choice is the likeliest one. The mean of the predictions over several draws is the Monte-Carlo estimate of what
    the model says on average. Estimators that draw nothing (``sample=False``) choose as ever.

    Raises:
        HardAttentionError: the model has no sites.
    """
    with active(Mode(sites_or_refuse(model), sampled=True)):
        yield model


@contextmanager
def execution(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """Run every site ``masked`` or ``gathered`` inside the block.

    Raises:
        HardAttentionError: another name, or the model has no sites.
    """
    if mode not in EXECUTIONS:
        raise unknown("execution", mode, EXECUTIONS)
    with active(Mode(sites_or_refuse(model), execution=mode)):
        yield model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into evaluation mode inside the block, and every module back into its own mode behind it."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in before:
            module.training = training
