"""Put selectors and hooks on a model, and take them off again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import HardAttentionConfig, SiteConfig
from ..errors import HardAttentionError, some_names
from . import attention, heads, members, patches, pooling
from .arguments import parameter_names, takes_keywords
from .build import Kinds, build_selector, name_scorers, reusable, shared_choices, source_protected
from .causal import after_prompt_layer, before_prompt_layer
from .cross import SOURCE_MASK
from .family import FAMILY, Family, Tower
from .layers import after_layer, before_layer
from .plan import LAYER, TOWER, LayerPlan, TowerPlan
from .prompt import CANDIDATES
from .selector import Selector, running
from .towers import (
    COPIES,
    HANDS_DOWN,
    NAMES,
    TRAINING_LOSS,
    close_call,
    finish_tower,
    open_call,
    open_tower,
)

HOSTS = ("selector", "input_selector")  # attributes that hold selectors
FOLLOWS = "hard_attention_follows"  # attribute of an attention module: the site whose choice it shares


def attach(
    model: nn.Module,
    config: HardAttentionConfig,
    family: Family,
    training_loss: tuple[Callable[..., None], Callable[..., None]],
    is_part: bool = False,
    is_built: bool = False,
) -> dict[str, Selector]:
    """Give a model the sites of a configuration, in place. A configuration that is refused changes nothing.

    Selectors that are there already and fit the new configuration are kept, with what they learned.

    Args:
        family: of the model. training_loss: adds the estimators' terms to an output, and prepares a training call; see ``towers.TRAINING_LOSS``.
        is_part: the model is being built inside another one, which has all the sites: here some may be missing.
        is_built: the model is complete, and so must have a site of the configuration. A checkpoint's may all lie in towers that the
            class being loaded leaves out.

    Returns:
        The selectors that were made, by site.
    """
    towers = family.towers(model)
    kinds: Kinds = {site: (tower, kind, n) for tower in towers.values() for site, kind, n in tower.sites()}
    absent = set(family.all_towers) - towers.keys()
    recommended = family.recommended(towers)
    if is_part:
        absent |= {pattern.split(".")[0] for pattern in config.sites or recommended}
    elif config.sites is None and recommended:
        config = config.replace(sites=recommended)  # a saved model does not change with the recommendation
    resolved = config.resolve(kinds, recommended, type(model).__name__, ignore=absent)
    if not resolved and (is_built or not absent):
        raise HardAttentionError(
            f"no site of {type(model).__name__} is selected by {list(config.sites or [])}; it has: {some_names(list(kinds))}."
        )
    resolved = name_scorers(resolved, kinds)
    config = config.with_scorers(resolved)  # a checkpoint must not depend on what "auto" means later
    _check_restore(model, config, towers)
    _check_averages(model, resolved, kinds, family)
    for name in dict.fromkeys(kinds[site][0].name for site in resolved):
        members.check_signatures(towers[name])
    leaders = shared_choices(resolved, kinds)
    table = family.target_table(model)
    target_size = 0 if table is None else table.shape[-1]
    existing = _existing(towers)
    built: dict[str, Selector] = {}
    kept: dict[str, Any] = {}
    for site, site_config in resolved.items():
        tower, kind, _ = kinds[site]
        selector = build_selector(site, site_config, tower, kind, target_size)
        if site in leaders:
            continue
        present = existing.get(site)
        if present is not None and reusable(running(present), site_config, selector):
            kept[site] = present
        else:
            built[site] = selector
    # nothing was changed so far, so that a refusal leaves the model as it was
    family.release(model)
    detach(model)
    for site, present in kept.items():
        for selector in _copies(present):
            selector.site = site  # a tower may have another name here than in the model that it stood in alone
            selector.set_config(resolved[site])
    for site, selector in {**kept, **built}.items():
        tower, kind, layer = kinds[site]
        host, name = tower.host(kind, layer, running(selector).scorer.needs_pixels)
        host.register_module(name, selector)
    for site, leader in leaders.items():
        tower, kind, layer = kinds[site]
        tower.host(kind, layer)[0].__dict__[FOLLOWS] = leader
    _write_config(model, config)
    _install(model, family, towers, config, training_loss)
    family.prepare(model)
    return built


def _copies(selector: Any) -> Iterator[Selector]:
    """The selector, or every copy that PEFT keeps of it."""
    return (module for module in selector.modules() if isinstance(module, Selector))


def _check_restore(model: nn.Module, config: HardAttentionConfig, towers: Mapping[str, Tower]) -> None:
    if config.restore is not False:
        return
    for name, tower in towers.items():
        if tower.spec.prompt or tower.spec.pools_by_place:
            raise HardAttentionError(
                f"restore=False leaves '{name}' of {type(model).__name__} without the places of its rows; its head reads them by place. "
                "Use restore=None."
            )
        read = any(other.source == name for other in towers.values())
        if read and tower.spec.restores:
            raise HardAttentionError(
                f"restore=False leaves '{name}' of {type(model).__name__} without the places of its rows; its reader finds them by the "
                "attention mask. Use restore=None."
            )


def _check_averages(model: nn.Module, resolved: Mapping[str, SiteConfig], kinds: Kinds, family: Family) -> None:
    if not heads.extends(model, family.spec.averaging_heads):
        return
    for site, config in resolved.items():
        if kinds[site][1] in ("inputs", "tokens") and isinstance(config.budget, str):
            raise HardAttentionError(
                f"budget={config.budget!r} at '{site}' keeps another number of rows in every example, and {type(model).__name__} averages "
                "the rows of a batch. Use a fixed budget, or a model with another head."
            )


def _existing(towers: Mapping[str, Tower]) -> dict[str, Any]:
    """The selectors that a model has, by site; PEFT's wrappers where it wrapped them."""
    found: dict[str, Any] = {}
    for tower in towers.values():
        for site, kind, layer in tower.sites():
            for pixels in (False, True) if kind == "inputs" else (False,):
                host, name = tower.host(kind, layer, pixels)
                selector = host._modules.get(name)
                if selector is not None:
                    found[site] = selector
    return found


# ---------------------------------------------------------------- hooks


def _install(
    model: nn.Module,
    family: Family,
    towers: Mapping[str, Tower],
    config: HardAttentionConfig,
    training_loss: tuple[Callable[..., None], Callable[..., None]],
) -> None:
    drops = {name: _first_drop(tower) for name, tower in towers.items()}
    idle = {name: _keeps_all(tower) for name, tower in towers.items()}
    for name, tower in towers.items():
        source_drops = tower.source is not None and drops.get(tower.source) is not None
        idle_source = tower.source is None or idle.get(tower.source, True)
        if _install_layers(tower, drops[name], source_drops, idle[name] and idle_source):
            _install_tower(model, family, tower, towers, drops[name], config, idle[name] and idle_source)
            members.mark(tower)
    module: Any = model
    module.__dict__[HANDS_DOWN] = family.owns(model) and takes_keywords(model)
    module.__dict__[NAMES] = parameter_names(model)
    tokens = [getattr(module.config, name, None) for name in family.spec.candidates] if family.owns(model) else []
    module.__dict__[CANDIDATES] = tuple(token for token in tokens if token is not None)
    module.__dict__[TRAINING_LOSS] = training_loss
    module.__dict__[COPIES] = parameter_names(model) if heads.extends(model, family.spec.copying_heads) else None
    module.__dict__[FAMILY] = family.name
    strict = not module.__dict__[HANDS_DOWN] or bool(module.__dict__[CANDIDATES])
    model.register_forward_pre_hook(open_call, with_kwargs=True)
    model.register_forward_hook(close_call, with_kwargs=True, always_call=strict)


def _selector_at(tower: Tower, kind: str, layer: int) -> Selector | None:
    """The selector of a site; None where there is none, or where its estimator never selects."""
    if layer >= len(tower.layers):  # a tower may have no layers
        return None
    for pixels in (False, True) if kind == "inputs" else (False,):
        host, name = tower.host(kind, layer, pixels)
        found = host._modules.get(name)
        if found is not None:
            selector = running(found)
            return None if selector.config.estimator == "soft" else selector
    return None


def _selectors_at(tower: Tower) -> list[Selector]:
    """The selectors of the tower's sites, those that never select left out."""
    found = (_selector_at(tower, kind, layer) for _, kind, layer in tower.sites())
    return [selector for selector in found if selector is not None]


def _keeps_all(tower: Tower) -> bool:
    """Whether every site of the tower keeps everything."""
    return all(selector.keeps_all for selector in _selectors_at(tower))


def _first_drop(tower: Tower) -> int | None:
    """The first layer behind which rows may be missing, -1 for the inputs; None when the tower drops none."""
    if "inputs" in tower.kinds and _selector_at(tower, "inputs", 0) is not None:
        return -1
    if "tokens" not in tower.kinds:
        return None
    return next((n for n in range(len(tower.layers)) if _selector_at(tower, "tokens", n) is not None), None)


def _packs(tower: Tower) -> bool:
    """Whether rows of the tower may be packed, because the host knows how many are left in each."""
    kinds = [("inputs", 0), *(("tokens", n) for n in range(len(tower.layers)))]
    found = [_selector_at(tower, kind, n) for kind, n in kinds if kind in tower.kinds]
    return any(s is not None and (s.data_dependent or bool(s.config.pack)) for s in found)


def _install_layers(tower: Tower, first_drop: int | None, source_drops: bool, idle: bool) -> bool:
    """Hook the layers that have something to do; whether any has."""
    spec, packs = tower.spec, _packs(tower)
    plans = [_layer_plan(tower, index) for index in range(len(tower.layers))]
    busy = not idle and (first_drop is not None or any(p.own or p.crosses for p in plans))
    followed = {p.follows for p in plans} | {p.cross_follows for p in plans}
    active = False
    for plan, layer in zip(plans, tower.layers, strict=True):
        behind = first_drop is not None and plan.index > first_drop
        # Transformers sizes a decoder's masks by the first layer's cache, which may be shorter than a later one
        behind = behind or (spec.prompt and any(p.own or p.follows is not None for p in plans[: plan.index]))
        reads = plan.cross is not None and source_drops
        plan.uses_table = plan.has_bias and not spec.causal and busy
        own = spec.attention_spec if spec.attention else spec.cross_spec
        plan.eager_only = own is not None and own.eager_only and (busy or reads)
        plan.leads = tuple(site for site in _own_sites(tower, plan) if site in followed)
        reads_keys = plan.own or plan.follows is not None
        reads_source = plan.crosses or plan.cross_follows is not None
        before = behind or plan.inputs or reads_keys or reads_source or plan.uses_table or reads or plan.eager_only
        if not (before or plan.tokens):
            continue
        active = True
        layer.__dict__[LAYER] = plan
        before_hook, after_hook = (
            (before_prompt_layer, after_prompt_layer) if spec.prompt else (before_layer, after_layer)
        )
        if before:
            layer.register_forward_pre_hook(before_hook, with_kwargs=True)
        last = plan.index == len(plans) - 1 and first_drop is not None
        plan.pools, plan.restores = last and spec.pooling is not None, last and spec.pools_by_place
        prunes = spec.prompt and reads_keys
        if plan.tokens or plan.pools or plan.restores or prunes or (behind and packs):
            # in front of others' hooks: FSDP2's takes the selector's weights away again
            layer.register_forward_hook(after_hook, with_kwargs=True, prepend=True)
        if spec.attention and (behind or plan.inputs or reads_keys or plan.uses_table or plan.eager_only):
            module, inner = tower.attention(layer, "self"), tower.attention_spec("self")
            attention.install(module, inner, plan.index, cross=False, windows=spec.windows)
        if reads_source or reads or (plan.eager_only and plan.cross is not None):
            attention.install(tower.attention(layer, "cross"), tower.attention_spec("cross"), plan.index, cross=True)
    return active


def _own_sites(tower: Tower, plan: LayerPlan) -> tuple[str, ...]:
    return tuple(f"{tower.name}.{kind}.{plan.index}" for kind in ("self", "cross"))


def _layer_plan(tower: Tower, index: int) -> LayerPlan:
    spec, layer = tower.spec, tower.layers[index]
    kinds = tower.kinds
    has_cross = "cross" in kinds
    plan = LayerPlan(
        tower=tower.name,
        index=index,
        names=parameter_names(layer),
        attention=spec.attention,
        attention_spec=spec.attention_spec,
        norm=spec.norm,
        cross=spec.cross if has_cross else None,
        cross_spec=spec.cross_spec,
        protected=tower.protected,
        source_protected=source_protected(tower),
        has_bias=spec.attention_spec.position_bias,
        causal=spec.causal,
        windows=spec.windows,
        window=tower.window(index),
        unmasked_source=SOURCE_MASK not in parameter_names(tower.module),
    )
    if "self" in kinds:
        plan.own = _selector_at(tower, "self", index) is not None
        plan.follows = tower.attention(layer, "self").__dict__.get(FOLLOWS)
    if has_cross:
        plan.crosses = _selector_at(tower, "cross", index) is not None
        plan.cross_follows = tower.attention(layer, "cross").__dict__.get(FOLLOWS)
    for kind in ("self", "cross"):
        selector = _selector_at(tower, kind, index) if kind in kinds else None
        if selector is not None and not selector.once:
            plan.chooses_inside = selector.site
    if "inputs" in kinds and index == 0:
        plan.inputs = layer._modules.get("input_selector") is not None and _selector_at(tower, "inputs", 0) is not None
    if "tokens" in kinds:
        plan.tokens = _selector_at(tower, "tokens", index) is not None
    return plan


def _install_tower(
    model: nn.Module,
    family: Family,
    tower: Tower,
    towers: Mapping[str, Tower],
    first_drop: int | None,
    config: HardAttentionConfig,
    idle: bool,
) -> None:
    is_read = any(other.source == tower.name for other in towers.values())
    restores = config.restore
    if restores is None:
        restores = heads.extends(model, family.spec.restored_heads) or (tower.spec.restores and not is_read)
    restores = restores or tower.spec.pools_by_place
    spec = tower.spec.patches
    pixels = spec is not None and tower.module.get_submodule(spec.module)._modules.get("input_selector") is not None
    tower.module.__dict__[TOWER] = TowerPlan(
        name=tower.name,
        layers=tower.spec.layers,
        names=parameter_names(tower.module),
        reads=tower.source,
        restores=restores,
        is_read=is_read,
        patches=spec if pixels and _selector_at(tower, "inputs", 0) is not None else None,
        protected=tower.protected,
        idle=idle,
        adds_terms=bool(config.self_distillation) or any(selector.adds_terms for selector in _selectors_at(tower)),
        pools=first_drop is not None and tower.spec.pooling is not None,
        always=tower.spec.always,
        patch_size=heads.patch_size(tower.config) if tower.reads_images else None,
        prompt=tower.spec.prompt,
    )
    if pixels and spec is not None:
        patches.install(tower.module.get_submodule(spec.module), spec)
    if first_drop is not None and tower.spec.pooling is not None:
        pooling.install(tower.module.get_submodule(tower.spec.pooling), tower.name)
    tower.module.register_forward_pre_hook(open_tower, with_kwargs=True)
    tower.module.register_forward_hook(finish_tower, with_kwargs=True, always_call=tower.spec.pooling is not None)


# ---------------------------------------------------------------- removal


def detach(model: nn.Module) -> None:
    """Take every hook, plan and selector off a model: outputs and state-dict keys are the stock ones, exactly."""
    _remove_hooks(model)
    for module in model.modules():
        module.__dict__.pop(FOLLOWS, None)
        for name in HOSTS:
            held = module._modules.get(name)
            if held is not None and any(isinstance(inner, Selector) for inner in held.modules()):
                del module._modules[name]


def _remove_hooks(model: nn.Module) -> None:
    for module in model.modules():
        _unhook(module)
        attention.uninstall(module)
        patches.uninstall(module)
        pooling.uninstall(module)
        members.unmark(module)
        for name in (LAYER, TOWER, HANDS_DOWN, NAMES, CANDIDATES, TRAINING_LOSS, COPIES, FAMILY):
            module.__dict__.pop(name, None)


def _unhook(module: nn.Module) -> None:
    ours = (
        open_call,
        close_call,
        open_tower,
        finish_tower,
        before_layer,
        after_layer,
        before_prompt_layer,
        after_prompt_layer,
    )
    for hooks, extras in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key in [key for key, hook in hooks.items() if hook in ours]:
            del hooks[key]
            for extra in extras:
                extra.pop(key, None)


# ---------------------------------------------------------------- configuration


def _write_config(model: nn.Module, config: HardAttentionConfig | None) -> None:
    """Write the dict to the configuration of the model and of every model inside it; config.json then carries it.

    Configurations are copied before they change: other models may hold the same object.
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
            vars(module.config).pop("hard_attention", None)  # the class says None
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
    """Take the dict out of the configurations again."""
    _write_config(model, None)


def place(selector: Selector, model: nn.Module) -> None:
    """Move a fresh selector to where the model's weights are, in their dtype."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is not None:
        device = weight.device if not weight.is_meta else _execution_device(model)
        selector.to(device=device, dtype=weight.dtype if weight.dtype.itemsize > 1 else torch.float32)


def _execution_device(model: nn.Module) -> Any:
    """Where Accelerate computes with weights that it keeps elsewhere; a selector of some kB stays there."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), "cpu")
