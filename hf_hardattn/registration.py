"""Hard attention on a live model: apply, remove, soft, status."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from . import peft_saving, registry
from .architectures import Tower, architecture_of, slots_after
from .config import HardAttentionConfig, SiteConfig
from .errors import HardAttentionError
from .hooks import ClosePass, OpenPass
from .layers import HardLayerNorm
from .recording import selectors
from .selector import Selector

PREFIX = "Hard"  # of the classes that replace stock ones


def apply(
    model: nn.Module,
    config: HardAttentionConfig | Mapping[str, Any] | None = None,
    *,
    reward: Callable[[dict[str, Any], Any], Tensor] | None = None,
) -> nn.Module:
    """Give a live model hard attention, in place; ``remove`` undoes it.

    Args:
        model: T5, ViT or BLIP with any head.
        config: a ``HardAttentionConfig`` or its dict; None takes the defaults at the recommended sites.
        reward: see ``set_reward``.

    Returns:
        ``model``.

    Raises:
        HardAttentionError: an unsupported model, or a site that does not exist.
    """
    attach(model, HardAttentionConfig.parse(config if config is not None else {}))
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    for selector in selectors(model).values():
        if weight is not None:
            selector.to(device=weight.device, dtype=weight.dtype)
        selector.train(model.training)
        module: Any
        for module in selector.modules():  # loaded later or trained: Transformers must not initialise it again
            module._is_hf_initialized = True
    if reward is not None:
        set_reward(model, reward)
    name_units(model)
    return model


def name_units(model: nn.Module) -> None:
    """Let device maps and FSDP find the units that they must not split by the class names that the model has now."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._no_split_modules:
            present = {type(module).__name__ for module in part.modules()}
            stock = {name.removeprefix(PREFIX) for name in part._no_split_modules}
            part._no_split_modules = {name for unit in stock for name in (unit, PREFIX + unit) if name in present}


def remove(model: nn.Module) -> nn.Module:
    """Take hard attention out again: classes, outputs and state-dict keys are the stock ones, exactly."""
    architecture = architecture_of(model)
    if architecture is None:
        return model
    tower: Any
    for tower in architecture.towers(model).values():
        stock = {hard: cls for cls, hard in tower.classes.items()}
        for module in tower.root.modules():
            if type(module) in stock:
                module.__class__ = stock[type(module)]
                for name in ("selector", "input_selector"):
                    module._modules.pop(name, None)
                module.__dict__.pop("follows", None)
        if isinstance(tower.layers, tower.hard_layers):
            tower.layers.__class__ = nn.ModuleList
            for name in ("tower", "restore", "source", "source_slots", "followed"):
                tower.layers.__dict__.pop(name, None)
        norm: Any = tower.final_norm
        if isinstance(norm, HardLayerNorm):
            object.__setattr__(norm, "__class__", nn.LayerNorm)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module.config).pop("hard_attention", None)  # the class says None
            _unhook(module)
    name_units(model)
    model.__dict__.pop("_hard_attention_reward", None)
    return model


def status(model: nn.Module) -> str:
    """A table of the model's sites: what chooses, how much it keeps, how it is trained, how it runs now."""
    found = selectors(model)
    if not found:
        return f"{type(model).__name__}: no hard attention (soft everywhere)"
    rows = [("site", "budget", "scorer", "estimator", "parameters", "runs")]
    followers = collections.Counter(getattr(module, "follows", None) for module in model.modules())
    for site, selector in found.items():
        runs = "soft" if not selector.enabled else "masked" if selector.masked else "gathered"
        count = f"{sum(p.numel() for p in selector.parameters()):,}"
        shared = f" (and {followers[site]} more)" if followers[site] else ""
        rows.append(
            (site + shared, str(selector.config.budget), selector.config.scorer, selector.config.estimator, count, runs)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def set_step(model: nn.Module, step: int, steps: int | None = None) -> None:
    """Tell the schedules the optimizer step, counted from 0; ``HardAttentionCallback`` does it for the Trainer.

    Args:
        steps: how many the whole training has; needed by schedules (and recipes) that give their length as a share of it.
    """
    for module in model.modules():
        if isinstance(module, Selector):
            module.step, module.steps = step, steps or module.steps


def set_reward(model: nn.Module, reward: Callable[[dict[str, Any], Any], Tensor] | None) -> None:
    """Set the reward of score-function estimators.

    Args:
        reward: maps the model's keyword inputs and its output to fp32 ``[B]``, higher = better; it need not be differentiable.
            None restores the default, minus the task loss of each example.
    """
    model.__dict__["_hard_attention_reward"] = reward


@contextmanager
def freeze_backbone(model: nn.Module) -> Iterator[nn.Module]:
    """Train the selectors only, inside the block (and for an optimizer built inside it)."""
    trained = {id(p) for s in model.modules() if isinstance(s, Selector) for p in s.parameters()}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def attach(model: nn.Module, config: HardAttentionConfig) -> None:
    architecture = architecture_of(model)
    if architecture is None:
        known = ", ".join(registry.names("architectures"))
        raise HardAttentionError(
            f"{type(model).__name__} is not supported by hard attention; known architectures: {known}. "
            "A new one is one file in hf_hardattn/architectures/."
        )
    towers = architecture.towers(model)
    kinds = {site: (name, kind, layer) for name, tower in towers.items() for site, kind, layer in tower.sites(name)}
    absent = set(architecture.all_towers) - towers.keys()
    resolved = config.resolve(kinds, architecture.recommended, type(model).__name__, ignore=absent)
    if not resolved and not absent:
        raise HardAttentionError(
            f"no site of {type(model).__name__} is selected by {list(config.sites or [])}; it has: {', '.join(kinds)}."
        )
    for name, tower in towers.items():
        if config.restore is False and tower.restore and any(other.source == name for other in towers.values()):
            raise HardAttentionError(
                f"restore=False leaves '{name}' of {type(model).__name__} without the places of its rows; its reader finds them by the "
                "attention mask. Use restore=None."
            )
    leaders = _leaders(resolved, kinds)
    remove(model)
    peft_saving.register()
    table = architecture.target_table(model)
    target_size = 0 if table is None else table.shape[-1]
    built = {
        site: _selector(site, site_config, towers[kinds[site][0]], kinds[site][1], target_size)
        for site, site_config in resolved.items()
    }
    for site in leaders:
        del built[site]
    for name, tower in towers.items():
        for module in tower.root.modules():
            if type(module) in tower.classes:
                module.__class__ = tower.classes[type(module)]
                module.register_module("selector", None)
                module.register_module("input_selector", None)
                module.__dict__["follows"] = None
        tower.layers.__class__ = tower.hard_layers
        tower.layers.tower = name
        tower.layers.restore = tower.restore if config.restore is None else config.restore
        tower.layers.followed = frozenset(leaders.values())
        if tower.final_norm is not None:
            tower.final_norm.__class__ = HardLayerNorm
    for site, selector in built.items():
        name, kind, layer = kinds[site]
        host, attribute = towers[name].host(kind, layer, selector.scorer.needs_pixels)
        host.register_module(attribute, selector)
    for site, leader in leaders.items():
        name, kind, layer = kinds[site]
        towers[name].host(kind, layer)[0].__dict__["follows"] = leader
    for tower in towers.values():
        tower.layers.source, tower.layers.source_slots = tower.source, _source_slots(tower.source, built)
    _hand_down(model, config)
    model.register_forward_pre_hook(
        OpenPass(any(tower.source in towers for tower in towers.values())), with_kwargs=True
    )
    model.register_forward_hook(ClosePass(), with_kwargs=True)


def _selector(site: str, config: SiteConfig, tower: Tower, kind: str, target_size: int) -> Selector:
    cross, rows = kind == "cross", kind in ("tokens", "inputs")
    scorer = registry.load("scorers", config.scorer)
    if scorer.needs_cls and (tower.always != "first" or cross or tower.causal):
        raise HardAttentionError(
            f"scorer '{config.scorer}' reads a CLS token; there is none among the candidates of '{site}'. Use another scorer."
        )
    if scorer.needs_grid and (tower.always != "first" or kind != "inputs"):
        raise HardAttentionError(
            f"scorer '{config.scorer}' reads a whole grid of patches; '{site}' has none. Use it at 'vision.inputs', or another scorer here."
        )
    if scorer.needs_pixels and (tower.embeddings is None or kind != "inputs"):
        raise HardAttentionError(
            f"scorer '{config.scorer}' reads the pixels of an image; '{site}' has none. Use it at 'vision.inputs' of a model of images, or "
            "another scorer here."
        )
    if rows and (scorer.per_query or config.per_head):
        what = f"scorer '{config.scorer}' chooses per query" if scorer.per_query else "per_head=True chooses per head"
        raise HardAttentionError(
            f"{what}; '{site}' drops whole tokens, one choice per row. Use it at a 'self' or 'cross' site."
        )
    if config.scorer_options.get("monotonic") and scorer.per_query and not cross:
        raise HardAttentionError(
            f"monotonic=True at '{site}' reads a source in order; queries that choose among their own row have none. Use it at a 'cross' site."
        )
    if scorer.sequential and tower.causal and kind == "self":
        raise HardAttentionError(
            f"scorer '{config.scorer}' makes one choice a row, look by look; at '{site}' each query chooses among its past. Use another scorer here."
        )
    per_query = scorer.per_query or (tower.causal and kind == "self")
    if config.share_selection and (rows or per_query):
        what = (
            "drops rows of the stream, once" if rows else "chooses for each query, and other layers have other queries"
        )
        raise HardAttentionError(
            f"share_selection=True at '{site}', which {what}; a choice is shared between the layers of 'self' or 'cross' sites, one for all "
            "queries of a row. Leave it False here."
        )
    selector = Selector(
        site,
        config,
        hidden_size=tower.channels if scorer.needs_pixels else tower.source_size if cross else tower.hidden_size,
        query_size=tower.hidden_size,
        heads=tower.heads,
        always=None if per_query else tower.source_always if cross else tower.always,
        causal=tower.causal and kind == "self",
        target_size=target_size,
    )
    if (
        config.execution == "gathered"
        and not selector.estimator.trains_gathered
        and selector.learned
        and config.estimator != "soft"
    ):
        raise HardAttentionError(
            f"execution='gathered' at '{site}' leaves estimator '{config.estimator}' without a gradient; it needs the dropped positions. "
            "Use execution='auto' (masked in training, gathered in evaluation) or a score-function estimator."
        )
    return selector


def _leaders(resolved: Mapping[str, SiteConfig], kinds: Mapping[str, tuple[str, str, int]]) -> dict[str, str]:
    """Each site that shares an earlier site's choice, and that site: of the same tower and kind, with the same configuration,
    and no rows dropped between."""
    leaders: dict[str, str] = {}
    choosing: list[str] = []
    for site in sorted((site for site in resolved if resolved[site].share_selection), key=lambda site: kinds[site][2]):
        alike = (
            other
            for other in choosing
            if kinds[other][:2] == kinds[site][:2]
            and resolved[other] == resolved[site]
            and not _drops(resolved, kinds, other, site)
        )
        leader = next(alike, None)
        if leader is None:
            choosing.append(site)
        else:
            leaders[site] = leader
    return leaders


def _drops(
    resolved: Mapping[str, SiteConfig], kinds: Mapping[str, tuple[str, str, int]], leader: str, site: str
) -> bool:
    """Whether the tower's rows change between two ``self`` sites; the rows that ``cross`` sites read do not."""
    (name, kind, start), (_, _, end) = kinds[leader], kinds[site]
    return kind == "self" and any(f"{name}.tokens.{layer}" in resolved for layer in range(start, end))


def _source_slots(source: str | None, built: Mapping[str, Selector]) -> Callable[[Tensor], int] | None:
    """How many rows of the tower ``source`` survive its sites at most, as a function of those that did; None when all do."""
    rows = (
        f"{source}.inputs",
        f"{source}.tokens.",
    )  # in the order of the stream: before the first layer, then by layer
    found = [selector for site, selector in built.items() if site.startswith(rows)]
    return functools.partial(slots_after, found) if found else None


def _hand_down(model: nn.Module, config: HardAttentionConfig) -> None:
    """Write the dict to the config of the model and of every model inside it; config.json then carries it."""
    data = config.to_dict()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.hard_attention = data
            if module is not model:
                _unhook(module)


def _unhook(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (OpenPass, ClosePass))]:
            del hooks[key]
            for extra in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                extra.pop(key, None)
