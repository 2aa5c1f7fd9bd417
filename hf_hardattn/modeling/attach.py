"""Attach selectors and hooks to a model, and detach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..config import HardAttentionConfig, SiteConfig
from ..errors import HardAttentionError, some_names
from . import heads, members
from .attached import existing_selectors
from .auxiliary_head import leave_heads_out
from .build import Kinds, build_selector, kinds_of, name_scorers, reusable, shared_choices
from .family import Family, Tower
from .hooks import install_hooks, remove_hooks
from .model_config import write_config
from .plan import FOLLOWS
from .selector import Selector, running

HOSTS = ("selector", "input_selector")  # attributes that hold selectors


def attach(
    model: nn.Module,
    config: HardAttentionConfig,
    family: Family,
    training_loss: tuple[Callable[..., None], Callable[..., None]],
    is_part: bool = False,
    is_built: bool = False,
) -> dict[str, Selector]:
    """Attach the sites of a configuration to a model in place. A refused configuration changes nothing.

    Existing selectors that fit the new configuration are kept with their trained weights.

    Args:
        family: family of the model. training_loss: two functions, see ``towers.TRAINING_LOSS``: one adds the estimators' terms to an
            output, the other prepares a training call.
        is_part: the model is being built inside another one, which has all the sites; some may be missing here.
        is_built: the model is complete, and so must have at least one site of the configuration. While a checkpoint is loaded, all its
            sites may be in towers that the model's class omits.

    Returns:
        The newly created selectors, by site.
    """
    towers = family.towers(model)
    kinds = kinds_of(towers)
    absent = set(family.all_towers) - towers.keys()
    recommended = family.recommended(towers)
    if is_part:
        absent |= {pattern.split(".")[0] for pattern in config.sites or recommended}
    elif config.sites is None and recommended:
        config = config.replace(sites=recommended)  # a saved model must not change if the recommendation does
    resolved = config.resolve(kinds, recommended, type(model).__name__, ignore=absent)
    if not resolved and (is_built or not absent):
        raise HardAttentionError(
            f"no site of {type(model).__name__} matches {list(config.sites or [])}; it has: {some_names(list(kinds))}."
        )
    resolved = name_scorers(resolved, kinds)
    # a checkpoint must depend neither on what "auto" means later, nor on the order of globs: config.json is sorted
    config = config.with_scorers(resolved)
    config = config if config.sortable(kinds) else config.naming(resolved)
    _check_restore(model, config, towers)
    _check_averages(model, resolved, kinds, family)
    hosts = {kinds[site][0].name for site in resolved}
    members.check_layers(tower for name, tower in towers.items() if name in hosts or tower.source in hosts)
    leaders = shared_choices(resolved, kinds)
    table = family.target_table(model)
    target_size = 0 if table is None else table.shape[-1]
    model_config: Any = model.config
    existing = existing_selectors(towers)
    built: dict[str, Selector] = {}
    kept: dict[str, Any] = {}
    for site, site_config in resolved.items():
        tower, kind, _ = kinds[site]
        selector = build_selector(site, site_config, tower, kind, target_size, model_config.num_labels)
        if site in leaders:
            continue
        present = existing.get(site)
        if present is not None and reusable(running(present), site_config, selector):
            kept[site] = present
        else:
            built[site] = selector
    # nothing has been changed so far, so that a refusal leaves the model as it was
    family.release(model)
    detach(model)
    for site, present in kept.items():
        for selector in _copies(present):
            selector.site = site  # a tower may have another name here than in a model of its own
            selector.config = resolved[site]
    for site, selector in {**kept, **built}.items():
        tower, kind, layer = kinds[site]
        host, name = tower.host(kind, layer, running(selector).scorer.needs_pixels)
        host.register_module(name, selector)
    for site, leader in leaders.items():
        tower, kind, layer = kinds[site]
        tower.host(kind, layer)[0].__dict__[FOLLOWS] = leader
    leave_heads_out(model)
    write_config(model, config)
    install_hooks(model, family, towers, config, training_loss)
    family.prepare(model)
    return built


def _copies(selector: Any) -> Iterator[Selector]:
    """Return the selector, or every copy of it that PEFT keeps."""
    return (module for module in selector.modules() if isinstance(module, Selector))


def _check_restore(model: nn.Module, config: HardAttentionConfig, towers: Mapping[str, Tower]) -> None:
    if config.restore is not False:
        return
    for name, tower in towers.items():
        if tower.spec.prompt or tower.spec.pools_by_place:
            raise HardAttentionError(
                f"restore=False leaves '{name}' of {type(model).__name__} without the positions of its rows; its head needs them. "
                "Use restore=None."
            )
        read = any(other.source == name for other in towers.values())
        if read and tower.spec.restores:
            raise HardAttentionError(
                f"restore=False leaves '{name}' of {type(model).__name__} without the positions of its rows; the tower that reads them needs "
                "positions for its attention mask. Use restore=None."
            )


def _check_averages(model: nn.Module, resolved: Mapping[str, SiteConfig], kinds: Kinds, family: Family) -> None:
    if not heads.extends(model, family.spec.averaging_heads):
        return
    for site, config in resolved.items():
        if kinds[site][1] in ("inputs", "tokens") and isinstance(config.budget, str):
            raise HardAttentionError(
                f"budget={config.budget!r} at '{site}' keeps a different number of rows in each example, but {type(model).__name__} averages "
                "the rows of a batch. Use a fixed budget, or a model with another head."
            )


def detach(model: nn.Module) -> None:
    """Remove every hook, plan and selector from a model, so that outputs and state-dict keys are exactly the original ones."""
    remove_hooks(model)
    for module in model.modules():
        module.__dict__.pop(FOLLOWS, None)
        for name in HOSTS:
            held = module._modules.get(name)
            if held is not None and any(isinstance(inner, Selector) for inner in held.modules()):
                del module._modules[name]
    leave_heads_out(model)


def place(selector: Selector, model: nn.Module) -> None:
    """Move a new selector to the device of the model's weights, with their dtype."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is not None:
        device = weight.device if not weight.is_meta else _execution_device(model)
        selector.to(device=device, dtype=weight.dtype if weight.dtype.itemsize > 1 else torch.float32)


def _execution_device(model: nn.Module) -> Any:
    """Return the device on which Accelerate computes with offloaded weights; a selector has only a few kB and stays there."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), "cpu")
