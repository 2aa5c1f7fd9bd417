"""Install the hooks that the sites of a hard model need, and remove them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..config import HardAttentionConfig
from . import attention_forward, heads, members, patches, pooling
from .arguments import parameter_names, takes_keywords
from .build import source_protected
from .causal import after_prompt_layer, before_prompt_layer
from .context import MODEL
from .cross import SOURCE_MASK
from .family import FAMILY, Family, Tower
from .layers import after_layer, before_layer
from .lost_terms import terms_of
from .plan import FOLLOWS, LAYER, TOWER, LayerPlan, TowerPlan
from .prompt import CANDIDATES
from .selector import Selector, running
from .towers import (
    COPIES,
    HANDS_DOWN,
    NAMES,
    SELECTORS,
    SHARES,
    TRAINING_LOSS,
    close_call,
    finish_tower,
    open_call,
    open_copy,
    open_tower,
)


def install_hooks(
    model: nn.Module,
    family: Family,
    towers: Mapping[str, Tower],
    config: HardAttentionConfig,
    training_loss: tuple[Callable[..., None], Callable[..., None]],
) -> None:
    """Install the plans that a model's selectors need, and hooks where there is something to do.

    Args:
        training_loss: see ``towers.TRAINING_LOSS``.
    """
    drops = {name: _first_drop(tower) for name, tower in towers.items()}
    idle = {name: _keeps_all(tower) for name, tower in towers.items()}
    for name, tower in towers.items():
        source_drops = tower.source is not None and drops.get(tower.source) is not None
        idle_source = tower.source is None or idle.get(tower.source, True)
        if _install_layers(tower, drops[name], source_drops, idle[name] and idle_source):
            _install_tower(model, family, tower, towers, drops[name], config, idle[name] and idle_source)
            tower.module.__dict__[TOWER].source_drops = source_drops and not idle_source
            members.mark(tower)
    module: Any = model
    module.__dict__[HANDS_DOWN] = family.spec.hands_down and family.owns(model) and takes_keywords(model)
    module.__dict__[NAMES] = parameter_names(model)
    tokens = [getattr(module.config, name, None) for name in family.spec.candidates] if family.owns(model) else []
    module.__dict__[CANDIDATES] = tuple(token for token in tokens if token is not None)
    readers = [
        n for n, tower in towers.items() if drops.get(tower.source or "") is not None and not idle[str(tower.source)]
    ]
    writes = getattr(model, "can_generate", bool)()
    choosers = [n for n, tower in towers.items() if (tokens or writes and tower.spec.prompt) and not idle[n]]
    module.__dict__[SHARES] = next(iter([*readers, *choosers]), None)
    module.__dict__[TRAINING_LOSS] = training_loss
    module.__dict__[SELECTORS] = tuple((host, name) for tower in towers.values() for _, host, name in tower.hosts())
    mark = object()
    for part in model.modules():
        part.__dict__[MODEL] = mark
        if heads.extends(part, family.spec.copying_heads):
            part.__dict__[COPIES] = parameter_names(part)
            if part is not model:
                part.register_forward_pre_hook(open_copy, with_kwargs=True)
    module.__dict__[FAMILY] = family.name
    model.register_forward_pre_hook(open_call, with_kwargs=True)
    model.register_forward_hook(close_call, with_kwargs=True, always_call=True)


def _selector_at(tower: Tower, kind: str, layer: int) -> Selector | None:
    """Return the selector of a site; None if there is none, or if its estimator never selects."""
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
    """Return the selectors of the tower's sites, without those that never select."""
    found = (_selector_at(tower, kind, layer) for _, kind, layer in tower.sites())
    return [selector for selector in found if selector is not None]


def _keeps_all(tower: Tower) -> bool:
    """Return whether every site of the tower keeps everything."""
    return all(selector.keeps_all for selector in _selectors_at(tower))


def _first_drop(tower: Tower) -> int | None:
    """Return the first layer after which rows may be missing, -1 for the inputs; None if the tower drops none."""
    if "inputs" in tower.kinds and _selector_at(tower, "inputs", 0) is not None:
        return -1
    if "tokens" not in tower.kinds:
        return None
    return next((n for n in range(len(tower.layers)) if _selector_at(tower, "tokens", n) is not None), None)


def _packs(tower: Tower) -> bool:
    """Return whether rows of the tower may be packed, because the host knows how many are left in each."""
    kinds = [("inputs", 0), *(("tokens", n) for n in range(len(tower.layers)))]
    found = [_selector_at(tower, kind, n) for kind, n in kinds if kind in tower.kinds]
    return any(s is not None and (s.data_dependent or bool(s.config.pack)) for s in found)


def _install_layers(tower: Tower, first_drop: int | None, source_drops: bool, idle: bool) -> bool:
    """Hook the layers that have something to do; return whether there are any."""
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
            # before other hooks: FSDP2's hook takes the selector's weights away again
            layer.register_forward_hook(after_hook, with_kwargs=True, prepend=True)
        if spec.attention and (behind or plan.inputs or reads_keys or plan.uses_table or plan.eager_only):
            module, inner = tower.attention(layer, "self"), tower.attention_spec("self")
            attention_forward.install(module, inner, plan.index, cross=False, windows=spec.windows)
        if reads_source or reads or (plan.eager_only and plan.cross is not None):
            attention_forward.install(
                tower.attention(layer, "cross"), tower.attention_spec("cross"), plan.index, cross=True
            )
    return active


def _own_sites(tower: Tower, plan: LayerPlan) -> tuple[str, ...]:
    return tuple(f"{tower.name}.{kind}.{plan.index}" for kind in ("self", "cross"))


def _layer_plan(tower: Tower, index: int) -> LayerPlan:
    spec, layer = tower.spec, tower.layers[index]
    kinds = [kind for kind in tower.kinds if kind != "cross" or tower.crosses(layer)]
    plan = LayerPlan(
        tower=tower.name,
        index=index,
        names=parameter_names(layer),
        attention=spec.attention,
        attention_spec=spec.attention_spec,
        norm=spec.norm,
        cross=spec.cross if "cross" in kinds else None,
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
    if "cross" in kinds:
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
        terms=terms_of(_selectors_at(tower), config.self_distillation),
        pools=first_drop is not None and tower.spec.pooling is not None,
        always=tower.spec.always,
        patch_size=heads.patch_size(tower.config) if tower.reads_images else None,
        prompt=tower.spec.prompt,
        needs=tuple(n for n, layer in enumerate(tower.layers) if LAYER in vars(layer) and vars(layer)[LAYER].is_needed),
    )
    if pixels and spec is not None:
        patches.install(tower.module.get_submodule(spec.module), spec)
    if first_drop is not None and tower.spec.pooling is not None:
        pooling.install(tower.module.get_submodule(tower.spec.pooling), tower.name)
    tower.module.register_forward_pre_hook(open_tower, with_kwargs=True)
    tower.module.register_forward_hook(finish_tower, with_kwargs=True, always_call=tower.spec.pooling is not None)


def end_behind_later_hooks(model: nn.Module) -> None:
    """Move the hook that ends a call after hooks that were added later, since one of them may add the loss to the output."""
    for key in [key for key, hook in model._forward_hooks.items() if hook is close_call]:
        model._forward_hooks.move_to_end(key)  # type: ignore[attr-defined]


def remove_hooks(model: nn.Module) -> None:
    """Remove every hook and plan from a model; selectors stay."""
    for module in model.modules():
        _unhook(module)
        attention_forward.uninstall(module)
        patches.uninstall(module)
        pooling.uninstall(module)
        members.unmark(module)
        for name in (
            LAYER,
            TOWER,
            MODEL,
            HANDS_DOWN,
            NAMES,
            SELECTORS,
            SHARES,
            CANDIDATES,
            TRAINING_LOSS,
            COPIES,
            FAMILY,
        ):
            module.__dict__.pop(name, None)


def _unhook(module: nn.Module) -> None:
    ours = (
        open_call,
        open_copy,
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
