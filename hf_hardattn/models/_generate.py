"""``generate`` of models that call their towers one by one."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import GenerationMixin

from ..modeling.context import ForwardContext, context_around


def generate_in_one_call(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``generate`` inside one context, so that the towers that read the image know which of its rows were kept."""
    if context_around(model) is not None:
        return type(model).generate(model, *args, **kwargs)
    context = ForwardContext(model)
    context.enter(model)
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        context.leave(model)


def prepare(model: nn.Module) -> None:
    """Wrap ``generate`` of a hard model that defines its own; ``release`` undoes it."""
    if getattr(type(model), "generate", GenerationMixin.generate) is not GenerationMixin.generate:
        model.__dict__["generate"] = functools.partial(generate_in_one_call, model)


def release(model: nn.Module) -> None:
    """Remove the wrapper."""
    found = model.__dict__.get("generate")
    if isinstance(found, functools.partial) and found.func is generate_in_one_call:
        del model.__dict__["generate"]
