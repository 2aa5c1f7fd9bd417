"""Hard attention on a model in memory: apply, remove, status, budgets, schedules and rewards.

Every function also accepts a wrapped model, see ``unwrapping``.
"""

from __future__ import annotations

import collections
import html
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import models
from .budget import BudgetLike
from .config import HardAttentionConfig
from .errors import HardAttentionError, unknown
from .losses.training_loss import TERMS
from .modeling.adapters import hold_in_adapters
from .modeling.attach import attach, detach, place
from .modeling.attached import followed, site_configs
from .modeling.build import kinds_of, shared_choices
from .modeling.context import is_soft_now
from .modeling.family import Family
from .modeling.model_config import remove_config
from .modeling.plan import FOLLOWS
from .modeling.remaining import hardly_meant, mixed_kinds, remaining, seldom_faster
from .modeling.selector import Selector
from .modes import all_selectors, selectors_or_refuse
from .recording import selectors
from .unwrapping import refuse_without_config, unwrap

REWARD = "_hard_attention_reward"
Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    config: HardAttentionConfig | Mapping[str, Any] | None = None,
    *,
    reward: Callable[[dict[str, Any], Any], Tensor] | None = None,
) -> Model:
    """Apply hard attention to a model in place; ``remove`` undoes it.

    If it is applied again, it keeps trained selectors at the sites whose scorer, estimator and baseline are unchanged. A refused
    configuration leaves the model as it was.

    Args:
        model: a supported model with any head, or your own ``PreTrainedModel`` around one.
        config: a ``HardAttentionConfig`` or its dict; None uses the defaults at the recommended sites.
        reward: see ``set_reward``.

    Returns:
        ``model``.

    Raises:
        HardAttentionError: if the model is not supported, or a site does not exist.
    """
    inner = unwrap(model)
    refuse_without_config(inner)
    built = attach_to(inner, HardAttentionConfig.parse(config if config is not None else {}), fresh=True)
    _warn_of_lonely_selectors(model, built)
    if reward is not None:
        set_reward(inner, reward)
    return model


def _warn_of_lonely_selectors(model: Any, built: Mapping[str, Selector]) -> None:
    """Warn if the gradients of new selectors are not averaged over the processes because the model was wrapped before."""
    many = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    learned = [site for site, selector in built.items() if selector.learned]
    if not many or not learned:
        return
    parts = model.modules() if isinstance(model, nn.Module) else unwrap(model).modules()
    for module in parts:
        sharded = any(hasattr(weight, "full_tensor") for weight in module.parameters(recurse=False))
        if sharded or isinstance(module, nn.parallel.DistributedDataParallel):
            warnings.warn(
                f"the selectors of {learned} were created after {'FSDP2' if sharded else 'DDP'} had wrapped {type(model).__name__}: their "
                "gradients are not averaged across the processes, which therefore drift apart. Call apply() first, then wrap the model.",
                stacklevel=3,
            )
            return


def attach_to(
    model: nn.Module, config: HardAttentionConfig, *, fresh: bool = False, is_part: bool = False
) -> dict[str, Selector]:
    """Attach a configuration to a model that is being built or, with ``fresh``, to one that already has its weights.

    Args:
        is_part: the model is being built inside another one, which has all the sites; some may be missing here.

    Returns:
        The newly created selectors, by site.

    Raises:
        HardAttentionError: if no family supports the model.
    """
    family = family_or_refuse(model)
    built = attach(model, config, family, TERMS, is_part, is_built=fresh)
    if not is_part:
        found = selectors(model)
        for said in (*hardly_meant(family.towers(model), found), *mixed_kinds(config.sites or (), found)):
            warnings.warn(said, stacklevel=3)
    if not fresh:
        return built
    for selector in built.values():
        place(selector, model)
        selector.train(model.training)
        module: Any
        for module in selector.modules():  # loaded later or trained: Transformers must not initialise it again
            module._is_hf_initialized = True
    hold_in_adapters(model, built.values())
    return built


def family_or_refuse(model: nn.Module) -> Family:
    """Return the family of a model.

    Raises:
        HardAttentionError: if no family supports it.
    """
    family = models.family_of(model)
    if family is None:
        raise HardAttentionError(
            f"{type(model).__name__} is not supported by hard attention; {models.why_unknown(model)}. "
            "To add a family, add its row of names to hf_hardattn/models/."
        )
    return family


def remove(model: Model) -> Model:
    """Remove hard attention, so that outputs and state-dict keys are exactly those of the original model."""
    inner = unwrap(model)
    family = models.family_of(inner)
    if family is None:
        return model
    family.release(inner)
    detach(inner)
    remove_config(inner)
    inner.__dict__.pop(REWARD, None)
    return model


def set_budget(model: Model, budget: BudgetLike | Mapping[str, BudgetLike]) -> Model:
    """Change how much the sites of a model keep; trained selectors are preserved.

    Args:
        budget: one budget for all sites, or a dict from site name to budget. Sites that share a choice are named by the first one.

    Returns:
        ``model``.

    Raises:
        HardAttentionError: if a budget is out of range, the model does not have a site, or two selectors with ``share_selection`` would
            become one.
    """
    inner: Any = unwrap(model)
    known = selectors(inner)
    if not known:
        raise HardAttentionError(
            f"{type(inner).__name__} has no hard-attention sites; load it with hard_attention=... or call apply()."
        )
    refuse_without_config(inner)
    towers = family_or_refuse(inner).towers(inner)
    config = HardAttentionConfig.parse(inner.config.hard_attention)
    by_site = isinstance(budget, Mapping) and any("." in str(name) for name in budget)
    if not by_site:
        config = config.replace(budget=budget)
    wanted: Any = budget if by_site else dict.fromkeys(known, budget)
    for site in wanted:
        if site not in known:
            raise unknown("site", site, known, type(inner).__name__)
    leaders, sites = followed(towers), site_configs(towers)
    for site, before in sites.items():
        leader = leaders.get(site, site)
        if leader in wanted:
            sites[site] = replace(before, budget=wanted[leader])
    merged = sorted(shared_choices(sites, kinds_of(towers)).items() - leaders.items())
    if merged:
        site, leader = merged[0]
        raise HardAttentionError(
            f"budget={sites[site].budget!r} at '{site}' is that of '{leader}', whose choice it would share (share_selection=True), and "
            "its own selector would be lost. Give them different budgets, or call apply() with the new configuration."
        )
    return apply(model, config.naming(sites))


class Status(str):
    """The text returned by ``status``. An interactive prompt or a notebook shows it as a table, without ``print``."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self)}</pre>"


def status(model: nn.Module) -> Status:
    """Return a table of the model's sites: what each one keeps, its scorer and estimator, and how it runs now.

    The column ``left`` combines the sites of a tower that drop rows: it shows how many rows of an image are left after each site, or the
    share of a text's tokens. Below the table are warnings about settings that are probably unintended, and notes on the number of rows
    from which sites that select keys save time, if this model may have fewer.
    """
    inner = unwrap(model)
    found = selectors(inner)
    if not found:
        return Status(f"{type(inner).__name__}: no hard attention (soft everywhere)")
    rows = [("site", "budget", "left", "scorer", "estimator", "parameters", "runs")]
    followers = collections.Counter(module.__dict__.get(FOLLOWS) for module in inner.modules())
    towers = family_or_refuse(inner).towers(inner)
    left = remaining(towers, found)
    for site, selector in found.items():
        count = f"{sum(p.numel() for p in selector.parameters()):,}"
        shared = f" (and {followers[site]} more)" if followers[site] else ""
        rows.append(
            (
                site + shared,
                str(selector.config.budget),
                str(left.get(site, "")),
                selector.config.scorer,
                selector.config.estimator,
                count,
                _how_it_runs(selector),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"warning: {said}" for said in hardly_meant(towers, found)]
    return Status("\n".join([*lines, *(f"note: {said}" for said in seldom_faster(towers, found))]))


def _how_it_runs(selector: Selector) -> str:
    if is_soft_now(selector) or selector.keeps_all:
        return "soft"
    return "masked" if selector.masked else "gathered"


def set_step(model: nn.Module, step: int, steps: int | None = None) -> None:
    """Set the optimizer step that schedules follow; ``HardAttentionCallback`` does it for the Trainer.

    A model without hard attention has no schedules and is left as it is, so that one training loop serves both.

    Args:
        step: int >= 0.
        steps: total number of training steps, int >= 1; needed by schedules (and recipes) whose length is a share of the training.

    Raises:
        HardAttentionError: if ``step`` or ``steps`` is not such a number.
    """
    for name, value, least in (("step", step, 0), ("steps", 1 if steps is None else steps, 1)):
        if not isinstance(value, int) or value < least:
            raise HardAttentionError(
                f"{name}={value!r} is not a number of optimizer steps in set_step; it is an int >= {least}."
            )
    selector: Any
    for selector in all_selectors(model):
        selector.step, selector.steps = step, steps or selector.steps


def set_reward(model: nn.Module, reward: Callable[[dict[str, Any], Any], Tensor] | None) -> None:
    """Set the reward of score-function estimators.

    Args:
        reward: maps the model's keyword inputs and its output to fp32 ``[B]``, higher = better; it need not be differentiable.
            None restores the default, which is minus the task loss of each example.

    Raises:
        HardAttentionError: if the model has no sites, or ``reward`` is no function.
    """
    if reward is not None and not callable(reward):
        raise HardAttentionError(
            f"reward={reward!r} is not a function in set_reward; it maps the inputs and the output to one number per example. Give a "
            "function, or None for minus the task loss."
        )
    found: Any = selectors_or_refuse(model) if reward is not None else []
    if found and not any("reward" in selector.estimator.needs for selector in found):
        names = sorted({selector.config.estimator for selector in found})
        warnings.warn(
            f"no site of {type(unwrap(model)).__name__} uses a reward: its estimators are {', '.join(names)}. Use a score-function estimator "
            "('reinforce', 'rloo', 'grpo'), or leave the reward out.",
            stacklevel=2,
        )
    unwrap(model).__dict__[REWARD] = reward


@contextmanager
def freeze_backbone(model: nn.Module) -> Iterator[nn.Module]:
    """Train only the selectors inside the block; build the optimizer inside it as well.

    Raises:
        HardAttentionError: if the model has no sites.
    """
    trained = {id(p) for s in selectors_or_refuse(model) for p in s.parameters()}
    whole = model if isinstance(model, nn.Module) else unwrap(model)  # PEFT's own parameters lie outside its base
    frozen = [p for p in whole.parameters() if p.requires_grad and id(p) not in trained]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
