"""Run a model soft, masked or gathered inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .config import SiteConfig
from .selector import Selector


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
