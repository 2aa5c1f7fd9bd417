"""Access to weights that Accelerate keeps elsewhere until their module is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


def weights_in_place(module: nn.Module) -> AbstractContextManager[None]:
    """Load a module's own weights to their device inside the block, for code that reads them without calling the module.

    Accelerate loads an offloaded module's weights in a hook around its ``forward``; outside it, they are on ``meta``.
    """
    hook = getattr(module, "_hf_hook", None)
    return nullcontext() if hook is None else _loaded(module, hook)


@contextmanager
def _loaded(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
