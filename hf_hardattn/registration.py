"""How hard attention gets into a Transformers model, and out of it again.

Importing the package lets ``config.hard_attention`` through ``PreTrainedConfig`` and wraps four methods of ``PreTrainedModel``.
All are inert until a config carries ``hard_attention``; then ``post_init``, which every model calls at the end of every way to
construct it, swaps the classes of that one model's modules and adds its selectors.

Transformers' own ``register_patch_mapping`` is not used: its ``patch_output_recorders`` rewrites class-level recorders, so that
models of the stock classes, even those built before, return no attentions any more; and it misses ``ViTModel(config)``.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import registry
from .architectures import Base as Architecture
from .architectures import Tower, slots_after
from .config import HardAttentionConfig, SiteConfig
from .errors import HardAttentionError
from .losses import auxiliary_loss
from .recording import selectors
from .selection import Selection
from .selector import Selector
from .sites import PASS, HardLayerNorm
from .stream import Pass

_PREFIX = "Hard"


def architecture_of(model: nn.Module) -> type[Architecture] | None:
    """The architecture that knows ``model``, or None."""
    for name in registry.names("architectures"):
        architecture = registry.load("architectures", name)
        if architecture.towers(model):
            return architecture
    return None


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
    _attach(model, HardAttentionConfig.parse(config if config is not None else {}))
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    for selector in selectors(model).values():
        if weight is not None:
            selector.to(device=weight.device, dtype=weight.dtype)
        selector.train(model.training)
        for module in selector.modules():  # loaded later or trained: Transformers must not initialise it again
            module._is_hf_initialized = True
    if reward is not None:
        set_reward(model, reward)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take hard attention out again: classes, outputs and state-dict keys are the stock ones, exactly."""
    architecture = architecture_of(model)
    if architecture is None:
        return model
    for tower in architecture.towers(model).values():
        stock = {hard: cls for cls, hard in tower.classes.items()}
        for module in tower.root.modules():
            if type(module) in stock:
                module.__class__ = stock[type(module)]
                for name in ("selector", "input_selector"):
                    module._modules.pop(name, None)
        if isinstance(tower.layers, tower.hard_layers):
            tower.layers.__class__ = nn.ModuleList
            for name in ("tower", "restore", "source", "source_slots"):
                tower.layers.__dict__.pop(name, None)
        if isinstance(tower.final_norm, HardLayerNorm):
            tower.final_norm.__class__ = nn.LayerNorm
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.hard_attention = None
            _unhook(module)
    model.__dict__.pop("_hard_attention_reward", None)
    return model


@contextmanager
def soft(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model soft inside the block: every site looks everywhere, the weights stay."""
    found = [m for m in model.modules() if isinstance(m, Selector)]
    before = [m.enabled for m in found]
    for selector in found:
        selector.enabled = False
    try:
        yield model
    finally:
        for selector, enabled in zip(found, before, strict=True):
            selector.enabled = enabled


@contextmanager
def execution(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """Run every site ``masked`` or ``gathered`` inside the block."""
    found = [m for m in model.modules() if isinstance(m, Selector)]
    before = [m.config for m in found]
    for selector in found:
        selector.config = SiteConfig(**{**vars(selector.config), "execution": mode})
    try:
        yield model
    finally:
        for selector, config in zip(found, before, strict=True):
            selector.config = config


def status(model: nn.Module) -> str:
    """A table of the model's sites: what chooses, how much it keeps, how it is trained, how it runs now."""
    found = selectors(model)
    if not found:
        return f"{type(model).__name__}: no hard attention (soft everywhere)"
    rows = [("site", "budget", "scorer", "estimator", "parameters", "runs")]
    for site, selector in found.items():
        runs = "soft" if not selector.enabled else "masked" if selector.masked else "gathered"
        count = f"{sum(p.numel() for p in selector.parameters()):,}"
        rows.append((site, str(selector.config.budget), selector.config.scorer, selector.config.estimator, count, runs))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def set_step(model: nn.Module, step: int) -> None:
    """Tell the schedules the optimizer step, counted from 0; ``HardAttentionCallback`` does it for the Trainer."""
    for module in model.modules():
        if isinstance(module, Selector):
            module.step = step


def set_reward(model: nn.Module, reward: Callable[[dict[str, Any], Any], Tensor] | None) -> None:
    """Set the reward of score-function estimators.

    Args:
        reward: maps the model's keyword inputs and its output to fp32 ``[B]``, higher = better; it need not be differentiable.
            None restores the default, minus the task loss of each example.
    """
    model._hard_attention_reward = reward


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


def _attach(model: nn.Module, config: HardAttentionConfig) -> None:
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
    remove(model)
    built = {
        site: _selector(site, site_config, towers[kinds[site][0]], kinds[site][1])
        for site, site_config in resolved.items()
    }
    for name, tower in towers.items():
        for module in tower.root.modules():
            if type(module) in tower.classes:
                module.__class__ = tower.classes[type(module)]
                module.register_module("selector", None)
                module.register_module("input_selector", None)
        tower.layers.__class__ = tower.hard_layers
        tower.layers.tower = name
        tower.layers.restore = tower.restore if config.restore is None else config.restore
        if tower.final_norm is not None:
            tower.final_norm.__class__ = HardLayerNorm
    for site, selector in built.items():
        name, kind, layer = kinds[site]
        host, attribute = towers[name].host(kind, layer)
        host.register_module(attribute, selector)
    for tower in towers.values():
        tower.layers.source, tower.layers.source_slots = tower.source, _source_slots(tower.source, built)
    _hand_down(model, config)
    model.register_forward_pre_hook(
        OpenPass(any(tower.source in towers for tower in towers.values())), with_kwargs=True
    )
    model.register_forward_hook(ClosePass(), with_kwargs=True)


def _family(model: nn.Module) -> bool:
    """Whether the model is a part of a supported family (a T5 stack, say): the model around it decides."""
    families = [registry.load("architectures", name).family for name in registry.names("architectures")]
    return type(model).__module__.startswith(tuple(families))


def _selector(site: str, config: SiteConfig, tower: Tower, kind: str) -> Selector:
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
    if rows and (scorer.per_query or config.per_head):
        what = f"scorer '{config.scorer}' chooses per query" if scorer.per_query else "per_head=True chooses per head"
        raise HardAttentionError(
            f"{what}; '{site}' drops whole tokens, one choice per row. Use it at a 'self' or 'cross' site."
        )
    per_query = scorer.per_query or (tower.causal and kind == "self")
    selector = Selector(
        site,
        config,
        hidden_size=tower.source_size if cross else tower.hidden_size,
        query_size=tower.hidden_size,
        heads=tower.heads,
        always=None if per_query else tower.source_always if cross else tower.always,
        causal=tower.causal and kind == "self",
    )
    if config.execution == "gathered" and selector.estimator.pathwise and selector.learned and config.estimator != "soft":
        raise HardAttentionError(
            f"execution='gathered' at '{site}' leaves estimator '{config.estimator}' without a gradient; it needs the dropped positions. "
            "Use execution='auto' (masked in training, gathered in evaluation) or a score-function estimator."
        )
    return selector


def _source_slots(source: str | None, built: Mapping[str, Selector]) -> Callable[[int], int] | None:
    """How many rows of the tower ``source`` survive its sites at most, as a function of its length; None when all do."""
    rows = (
        f"{source}.inputs",
        f"{source}.tokens.",
    )  # in the order of the stream: before the first layer, then by layer
    budgets = [selector.budget_bound for site, selector in built.items() if site.startswith(rows)]
    return functools.partial(slots_after, budgets) if budgets else None


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


class OpenPass:
    """Forward pre-hook of a hard model: hands the towers a ``Pass`` by keyword."""

    def __init__(self, shares_gates: bool):
        self.shares_gates = shares_gates

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, PASS: Pass(shares_gates=self.shares_gates)}


class ClosePass:
    """Forward hook of a hard model: in training mode adds the estimators' terms to ``outputs.loss``."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        selections = kwargs[PASS].selections
        return _add_terms(model, args, kwargs, output, selections) if model.training and selections else output


def _add_terms(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, selections: list[Selection]
) -> Any:
    by_site = selectors(model)
    inputs = _named(model, args, {name: value for name, value in kwargs.items() if name != PASS})
    loss = (
        output.get("loss") if isinstance(output, Mapping) else output[0] if inputs.get("labels") is not None else None
    )
    needs_reward = any(s.log_prob is not None for s in selections)
    if loss is None:
        if needs_reward:
            warnings.warn(
                f"{type(model).__name__} returned no loss, so the score-function estimators of its sites got no reward and do not train. "
                "Pass labels, or add hf_hardattn.auxiliary_loss(selections, hf_hardattn.selectors(model), reward) to your loss.",
                stacklevel=2,
            )
        return output
    reward = _reward(model, inputs, output, loss) if needs_reward else None
    greedy = None
    if needs_reward and any(s.baseline is not None and s.baseline.needs_greedy for s in by_site.values()):
        greedy = _greedy_reward(model, inputs, args, kwargs)
    extra = auxiliary_loss(selections, by_site, reward, greedy)
    if extra is None:
        return output
    total = loss + extra.to(loss.dtype)
    if isinstance(output, Mapping):
        output["loss"] = total
        return output
    return (total, *output[1:])


def _reward(model: nn.Module, inputs: dict[str, Any], output: Any, loss: Tensor) -> Tensor:
    """Reward of each example ``[B]``, or of the batch ``[]`` where the output does not tell."""
    custom = model.__dict__.get("_hard_attention_reward")
    with torch.no_grad():
        if custom is not None:
            reward = torch.as_tensor(custom(inputs, output), dtype=torch.float32, device=loss.device)
            if reward.dim() != 1:
                raise HardAttentionError(
                    f"the reward function returned shape {tuple(reward.shape)}; it must give one number per example, [B]."
                )
            return reward
        losses = architecture_of(model).example_loss(model, inputs, output) if isinstance(output, Mapping) else None
        return -(loss if losses is None else losses).detach().float()


def _greedy_reward(model: nn.Module, inputs: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Reward of the deterministic choices: the same forward in evaluation mode, without gradient."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            output = model.forward(*args, **{**kwargs, PASS: Pass()})
    finally:
        for module, training in modes:
            module.training = training
    loss = output["loss"] if isinstance(output, Mapping) else output[0]
    return _reward(model, inputs, output, loss)


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "kwargs"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _check_loaded(
    model: PreTrainedModel, info: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], asked: bool
) -> None:
    """Raise when a checkpoint says that it is hard and lacks its selectors; warn when it has selectors and runs soft."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Selector))
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(prefixes)) if prefixes else []
    if lacking and not asked:
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        hub = {k: kwargs[k] for k in ("revision", "subfolder", "token", "cache_dir", "local_files_only") if k in kwargs}
        saved, _ = PreTrainedConfig.get_config_dict(place, **hub)
        if (
            saved.get("hard_attention")
            and HardAttentionConfig.parse(saved["hard_attention"]).to_dict() == model.config.hard_attention
        ):
            raise HardAttentionError(
                f"{place} says hard_attention in its config, but its weights lack {len(lacking)} selector tensors (first: '{lacking[0]}'); "
                "a hard checkpoint must hold its selectors. Load a complete checkpoint, or pass hard_attention=HardAttentionConfig(...) "
                "to train fresh ones, or hard_attention=None to load it soft."
            )
    spare = [key for key in info["unexpected_keys"] if "selector.scorer." in key]
    if spare and not asked and not prefixes:
        warnings.warn(
            f"the checkpoint holds {len(spare)} selector tensors (first: '{spare[0]}') but its config has no hard_attention: "
            "the model runs SOFT. Pass hard_attention=... to use them, or hard_attention=None to silence this.",
            stacklevel=3,
        )


def register() -> None:
    """Wrap Transformers once; called by ``import hf_hardattn``."""
    if "hard_attention" in PreTrainedConfig.__dict__:
        return
    PreTrainedConfig.hard_attention = None  # from_pretrained takes keywords its config has an attribute for
    post_init, init_weights = PreTrainedModel.post_init, PreTrainedModel._init_weights
    from_pretrained, to_dict = PreTrainedModel.from_pretrained.__func__, PreTrainedConfig.to_dict

    @functools.wraps(post_init)
    def hard_post_init(self: PreTrainedModel) -> None:
        wanted = getattr(self.config, "hard_attention", None)
        known = architecture_of(self) is not None
        if wanted is not None and (known or not _family(self)):
            _attach(self, HardAttentionConfig.parse(wanted))
        elif known and selectors(self):  # the outer config decides: hard parts of a model that was asked to be soft
            remove(self)
        post_init(self)
        if wanted is not None and known:  # device maps and FSDP find the units not to split by class name
            self._no_split_modules |= {_PREFIX + name for name in self._no_split_modules}

    @functools.wraps(init_weights)
    def hard_init_weights(self: PreTrainedModel, module: nn.Module) -> None:
        if isinstance(module, Selector):
            module.reset_parameters()
        else:
            init_weights(self, module)

    @functools.wraps(from_pretrained)
    def hard_from_pretrained(
        cls: type[PreTrainedModel], *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        given = getattr(kwargs.get("config"), "hard_attention", None)
        asked = "hard_attention" in kwargs or isinstance(given, HardAttentionConfig)
        model, info = from_pretrained(cls, *args, output_loading_info=True, **kwargs)
        _check_loaded(model, info, args, kwargs, asked)
        return (model, info) if output_loading_info else model

    @functools.wraps(to_dict)
    def hard_to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        data = to_dict(self)
        if isinstance(data.get("hard_attention"), HardAttentionConfig):
            data["hard_attention"] = data["hard_attention"].to_dict()
        return data

    PreTrainedModel.post_init = hard_post_init
    PreTrainedModel._init_weights = hard_init_weights
    PreTrainedModel.from_pretrained = classmethod(hard_from_pretrained)
    PreTrainedConfig.to_dict = hard_to_dict
