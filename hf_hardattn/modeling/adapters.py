"""Selectors in PEFT's adapters: an adapter that is trained holds copies of them, as it does of a classifier."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from torch import nn

from ..errors import HardAttentionError
from .attach import HOSTS
from .selector import Selector

logger = logging.getLogger(__name__)


def selector_names(model: nn.Module) -> list[str]:
    """Return the attributes under which the model holds selectors with parameters."""
    found = set()
    for module in model.modules():
        for name in HOSTS:
            held = module._modules.get(name)
            inside = [] if held is None else [part for part in held.modules() if isinstance(part, Selector)]
            if any(next(selector.parameters(), None) is not None for selector in inside):
                found.add(name)
    return sorted(found)


def add_selectors(model: nn.Module, config: Any) -> None:
    """Add a hard model's selectors to ``modules_to_save`` of an adapter, as PEFT does with a classifier.

    Otherwise the selectors would not be trained, would usually keep their random initial values, and would be in no file. To leave
    them untrained, call ``requires_grad_(False)`` on their parameters afterwards.

    Raises:
        HardAttentionError: the adapter changes single parameters of selectors.
    """
    if not hasattr(config, "modules_to_save"):
        return
    _refuse_parameters(model, getattr(config, "target_parameters", None) or ())
    known = list(config.modules_to_save or ())
    forgotten = [name for name in selector_names(model) if not any(name.endswith(other) for other in known)]
    if forgotten:
        config.modules_to_save = known + forgotten
        logger.info("modules_to_save gained the selectors of hard attention: %s", ", ".join(forgotten))


def _refuse_parameters(model: nn.Module, targets: Collection[str]) -> None:
    selectors = [(name, module) for name, module in model.named_modules() if isinstance(module, Selector)]
    parameters = (f"{path}.{name}" for path, selector in selectors for name, _ in selector.named_parameters())
    for parameter in parameters:
        target = next((target for target in targets if parameter == target or parameter.endswith(f".{target}")), None)
        if target is not None:
            raise HardAttentionError(
                f"target_parameters={target!r} names '{parameter}' of a selector; an adapter trains and saves selectors whole, by "
                "modules_to_save. Leave it out of target_parameters."
            )


def hold_in_adapters(model: Any, selectors: Collection[Selector]) -> None:
    """Let the adapters of a model hold selectors that were made after PEFT had added the adapters.

    Args:
        model: the base model, on which PEFT keeps the configurations of its adapters.
        selectors: the new selectors.
    """
    configs = {name: c for name, c in getattr(model, "peft_config", {}).items() if hasattr(c, "modules_to_save")}
    new = {id(selector) for selector in selectors if next(selector.parameters(), None) is not None}
    if not configs or not new:
        return
    # imported late: only models with adapters need it
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    active: list[str] = next((layer.active_adapters for layer in layers), [])
    for module in list(model.modules()):
        for name in HOSTS:
            selector = module._modules.get(name)
            if id(selector) not in new:
                continue
            first, *others = configs
            wrapper = ModulesToSaveWrapper(selector, first)
            for adapter in others:
                wrapper.update(adapter)
            chosen = [adapter for adapter in active if adapter in configs][:1]
            wrapper.set_adapter(chosen, inference_mode=any(configs[adapter].inference_mode for adapter in chosen))
            module.register_module(name, wrapper)
    for config in configs.values():
        add_selectors(model, config)
