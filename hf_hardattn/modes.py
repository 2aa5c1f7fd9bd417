"""Run a model soft, masked or gathered inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .config import SiteConfig
from .selector import Selector

_END = 2**40  # an optimizer step behind the end of every schedule


@contextmanager
def soft(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model soft inside the block: every site looks everywhere, the weights stay."""
    found = [m for m in model.modules() if isinstance(m, Selector)]
    before = [m.enabled for m in found]
    for selector in found:
        selector.enabled = False
    try:
        yield model
    finally:
        for selector, enabled in zip(found, before, strict=True):
            selector.enabled = enabled


@contextmanager
def sampled(model: nn.Module) -> Iterator[nn.Module]:
    """Draw the choices inside the block, by the law that the training ends with; the rest of the model stays in its mode.

    In evaluation mode a choice is the likeliest one. The mean of the predictions over several draws is the Monte-Carlo estimate of what
    the model says on average. Estimators that draw nothing (``sample=False``) choose as ever.
    """
    found = [m for m in model.modules() if isinstance(m, Selector)]
    before = [(m.training, m.step, m.steps, m.target) for m in found]
    for selector in found:
        selector.train()
        selector.step, selector.steps, selector.target = _END, _END, None
    try:
        yield model
    finally:
        for selector, (training, step, steps, target) in zip(found, before, strict=True):
            selector.train(training)
            selector.step, selector.steps, selector.target = step, steps, target


@contextmanager
def execution(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """Run every site ``masked`` or ``gathered`` inside the block."""
    found = [m for m in model.modules() if isinstance(m, Selector)]
    before = [m.config for m in found]
    for selector in found:
        selector.config = SiteConfig(**{**vars(selector.config), "execution": mode})
    try:
        yield model
    finally:
        for selector, config in zip(found, before, strict=True):
            selector.config = config
