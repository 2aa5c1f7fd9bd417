"""The learning rate of selectors, which are trained from scratch even if a pretrained model is fine-tuned at a small rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modeling.selector import Selector

# Compared with the Trainer's default of 5e-5 in results/unseen_images.json.
LEAST = 1e-3


def selector_rate(learning_rate: float, asked: float | None) -> float:
    """Return the learning rate of the selectors: ``asked`` if given, else ``learning_rate`` but at least ``LEAST``."""
    return max(learning_rate, LEAST) if asked is None else asked


def selector_parameters(model: nn.Module) -> set[int]:
    """Return the ids of all parameters of selectors, including those of the copies that PEFT keeps."""
    return {id(p) for module in model.modules() if isinstance(module, Selector) for p in module.parameters()}


def set_selector_rate(optimizer: Any, model: nn.Module, rate: float) -> None:
    """Move the selectors of ``model`` to separate groups with the learning rate ``rate``, in an optimizer that has not been used yet."""
    chosen = selector_parameters(model)
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": rate})
