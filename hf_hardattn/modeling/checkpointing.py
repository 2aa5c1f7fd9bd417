"""Gradient checkpointing of the reentrant kind: tensors with a gradient must be positional arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class PositionalTensors:
    """Wrap a layer's checkpointing function so that it follows tensors inside keywords and tuples.

    Transformers calls it with ``partial(forward, layer, **keywords)`` and the positional arguments. Reentrant checkpointing
    detaches positional tensors and would use the graph of every other tensor twice. The gates of masked training travel
    inside the mask argument, which some families pass by keyword.

    Args:
        function: the layer's own ``_gradient_checkpointing_func``.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, forward: partial[Any], *args: Any) -> Any:
        leaves, structure = tree_flatten((args, forward.keywords))
        moved = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]

        def run(*tensors: Tensor) -> Any:
            current = list(leaves)
            for index, tensor in zip(moved, tensors, strict=True):
                current[index] = tensor
            positional, keywords = tree_unflatten(current, structure)
            return forward.func(*forward.args, *positional, **keywords)

        return self.function(run, *(leaves[index] for index in moved))


def follow_all_tensors(layer: nn.Module) -> None:
    """Make a checkpointed layer follow gates wherever they are among its arguments."""
    if torch.compiler.is_compiling() or not getattr(layer, "gradient_checkpointing", False):
        return
    module: Any = layer
    if not isinstance(module._gradient_checkpointing_func, PositionalTensors):
        module._gradient_checkpointing_func = PositionalTensors(module._gradient_checkpointing_func)
