"""The dict ``hard_attention`` in the configurations of a model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import HardAttentionConfig


def write_config(model: nn.Module, config: HardAttentionConfig | None) -> None:
    """Write the dict to the configuration of the model and of every model inside it, so that config.json contains it.

    Configurations are copied before they change, because other models may share the same object.
    """
    data = None if config is None else config.to_dict()
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module.config, "hard_attention", None) != data:
            _copy_config(module.config, copies)
    for module in model.modules():
        held = module.__dict__.get("config")
        if id(held) in copies:
            module.__dict__["config"] = copies[id(held)]
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        if data is None:
            vars(module.config).pop("hard_attention", None)  # the class attribute is None
        else:
            module.config.hard_attention = data


def _copy_config(config: PreTrainedConfig, copies: dict[int, Any]) -> None:
    if id(config) in copies or any(config is made for made in copies.values()):
        return
    made = copy.copy(config)
    copies[id(config)] = made
    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig):
            _copy_config(part, copies)
            setattr(made, name, copies.get(id(part), part))


def remove_config(model: nn.Module) -> None:
    """Remove the dict from the configurations."""
    write_config(model, None)
