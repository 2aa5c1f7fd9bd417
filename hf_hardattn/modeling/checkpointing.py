"""Gradient checkpointing of hard layers: always the kind that follows every tensor."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


def checkpoint_without_reentry(layer: nn.Module) -> None:
    """Make a checkpointed layer use non-reentrant checkpointing, whatever kind was asked for.

    The reentrant kind follows positional tensors only. The gates of masked training travel inside the mask argument, which some
    families pass by keyword, and choices of each query add terms to the loss inside the layer: both would lose their gradient.
    """
    if torch.compiler.is_compiling() or not getattr(layer, "gradient_checkpointing", False):
        return
    module: Any = layer
    function = module._gradient_checkpointing_func
    if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
        keywords = {**function.keywords, "use_reentrant": False}
        module._gradient_checkpointing_func = functools.partial(function.func, *function.args, **keywords)
