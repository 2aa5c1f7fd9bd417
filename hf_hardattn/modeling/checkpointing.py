"""Gradient checkpointing of hard layers, which must be non-reentrant to track every tensor."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..errors import HardAttentionError


def checkpoint_without_reentry(layer: nn.Module, chooses_inside: str | None = None) -> None:
    """Make a layer use non-reentrant checkpointing, if checkpointing was enabled before hard attention was applied.

    Reentrant checkpointing tracks positional tensors only. The gates of masked training are passed inside the mask argument, which some
    families pass by keyword, and per-query choices add terms to the loss inside the layer: both would lose their gradient.

    Args:
        chooses_inside: a site that chooses for each query inside the layer's forward, and so again when the layer is recomputed.

    Raises:
        HardAttentionError: if the recomputation would draw other choices than the forward pass did.
    """
    if torch.compiler.is_compiling() or not getattr(layer, "gradient_checkpointing", False):
        return
    module: Any = layer
    function = module._gradient_checkpointing_func
    if not isinstance(function, functools.partial):
        return
    if chooses_inside is not None and layer.training and function.keywords.get("preserve_rng_state") is False:
        raise HardAttentionError(
            f"'{chooses_inside}' selects for each query inside the checkpointed layer; with preserve_rng_state=False, the backward pass would "
            "draw other selections than the forward pass. Leave preserve_rng_state at True."
        )
    module._gradient_checkpointing_func = without_reentry(function)


def without_reentry(function: Any) -> Any:
    """Return a non-reentrant checkpoint function; anything but a ``partial`` of a reentrant one is returned unchanged."""
    if not isinstance(function, functools.partial) or not function.keywords.get("use_reentrant"):
        return function
    return functools.partial(function.func, *function.args, **{**function.keywords, "use_reentrant": False})
