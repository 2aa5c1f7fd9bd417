"""Run a model soft, masked or gathered inside a block.

Modes belong to the thread that switched them on. Compiled models run eagerly inside the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .errors import HardAttentionError, unknown
from .fields import EXECUTIONS
from .modeling.context import Mode, active
from .modeling.selector import Selector
from .unwrapping import unwrap


def all_selectors(model: nn.Module) -> list[nn.Module]:
    """Every selector in a model, the copies of PEFT's other adapters too."""
    return [module for module in unwrap(model).modules() if isinstance(module, Selector)]


def selectors_or_refuse(model: nn.Module) -> list[nn.Module]:
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


@contextmanager
def soft(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model soft inside the block: no site selects anything, the weights stay."""
    with active(Mode(all_selectors(model), soft=True)):
        yield model


@contextmanager
def sampled(model: nn.Module) -> Iterator[nn.Module]:
    """Draw the choices inside the block, by the law that the training ends with; the rest of the model stays in its mode.

    In evaluation mode a choice is the likeliest one. The mean of the predictions over several draws is the Monte-Carlo estimate of what
    the model says on average. Estimators that draw nothing (``sample=False``) choose as ever.

    Raises:
        HardAttentionError: the model has no sites.
    """
    with active(Mode(selectors_or_refuse(model), sampled=True)):
        yield model


@contextmanager
def execution(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """Run every site ``masked`` or ``gathered`` inside the block.

    Raises:
        HardAttentionError: another name, or the model has no sites.
    """
    if mode not in EXECUTIONS:
        raise unknown("execution", mode, EXECUTIONS)
    with active(Mode(selectors_or_refuse(model), execution=mode)):
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
