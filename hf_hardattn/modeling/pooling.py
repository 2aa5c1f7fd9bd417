"""Pooling of a tower's rows after its last layer, which must not see the slots that a selection left unused."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .arguments import Arguments, parameter_names
from .context import context_around


def install(module: nn.Module, tower: str) -> None:
    """Hook the pooling module of a tower."""
    module.register_forward_pre_hook(functools.partial(hide_unused_slots, tower), with_kwargs=True)


def uninstall(module: nn.Module) -> None:
    """Remove the hook."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, functools.partial) and hook.func is hide_unused_slots:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def hide_unused_slots(tower: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a ``MultiheadAttention`` over the rows of a tower, or of a module with a mask ``[B, N]`` of them."""
    context = context_around(module)
    state = None if context is None else context.towers.get(tower)
    if state is None or not state.dropped:
        return None
    if not isinstance(module, nn.MultiheadAttention):
        arguments = Arguments(parameter_names(module), args, kwargs)
        arguments.set("attention_mask", None if state.valid is None else state.valid.long())
        return arguments.result()
    if state.valid is None:
        return None
    return args, {**kwargs, "key_padding_mask": ~state.valid}
