"""Run a model soft, masked or gathered inside a block.

Modes belong to the thread that switched them on. Compiled models run eagerly inside the block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

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


def site_names(model: nn.Module) -> dict[int, str]:
    """The site of every selector in a model, by the selector's id; PEFT's copies of one selector share a name.

    A model attached as a whole numbers its towers of one kind itself. Where several models stand in one container, the second
    tower of a name is numbered here in the same way: ``vision2.inputs``.
    """
    model = unwrap(model)
    names: dict[int, str] = {}
    towers: set[str] = set()
    for tower in unwrap(model).modules():
        if TOWER in tower.__dict__:
            name = _free_name(tower.__dict__[TOWER].name, towers)
            towers.add(name)
            for selector in all_selectors(tower):
                names[id(selector)] = f"{name}.{selector.site.split('.', 1)[1]}"
    for selector in all_selectors(model):
        names.setdefault(id(selector), selector.site)
    return names


def sites_or_refuse(model: nn.Module) -> dict[int, str]:
    """As ``site_names``; a model without sites is refused, see ``selectors_or_refuse``."""
    selectors_or_refuse(model)
    return site_names(model)


def _free_name(name: str, taken: set[str]) -> str:
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
