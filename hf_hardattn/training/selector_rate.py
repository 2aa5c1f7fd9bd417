"""The learning rate of selectors: they start from nothing, also where a pretrained model is fine-tuned at a small rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modeling.selector import Selector

# Measured beside the Trainer's default of 5e-5 (results/unseen_images.json).
LEAST = 1e-3


def selector_rate(learning_rate: float, asked: float | None) -> float:
    """The rate of the selectors in a training at ``learning_rate``: what was asked for, else at least ``LEAST``."""
    return max(learning_rate, LEAST) if asked is None else asked


def selector_parameters(model: nn.Module) -> set[int]:
    """The ids of all parameters of selectors, those of every copy that PEFT keeps too."""
    return {id(p) for module in model.modules() if isinstance(module, Selector) for p in module.parameters()}


def set_selector_rate(optimizer: Any, model: nn.Module, rate: float) -> None:
    """Give the selectors of ``model`` groups of their own, with the learning rate ``rate``, in an optimizer that nobody has used yet."""
    chosen = selector_parameters(model)
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": rate})
