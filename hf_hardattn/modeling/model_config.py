"""The dict ``hard_attention`` in the configurations of a model."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import HardAttentionConfig
from ..errors import HardAttentionError

ATTACHED = "hard_attention_attached"  # attribute of a model: the dict as it was attached


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
            module.__dict__.pop(ATTACHED, None)
        else:
            module.config.hard_attention = data
            module.__dict__[ATTACHED] = copy.deepcopy(data)


def refuse_edited_config(model: nn.Module) -> None:
    """Refuse to save a configuration that is not the one that the model runs with.

    Raises:
        HardAttentionError: if ``model.config.hard_attention`` was changed after it was attached.
    """
    attached, held = model.__dict__.get(ATTACHED), getattr(model.config, "hard_attention", None)
    if attached is None or held is None or HardAttentionConfig.parse(held).to_dict() == attached:
        return
    raise HardAttentionError(
        f"config.hard_attention of {type(model).__name__} was changed after it had been attached, which does not change the model; the file "
        "would say what the model does not do. Use set_budget(), or apply(model, config) with the changed configuration."
    )


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
