"""Build the selectors of a model, or explain why a site cannot have one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import registry
from ..config import AUTO, SiteConfig
from ..errors import HardAttentionError
from .candidates import Protected
from .family import Tower
from .implementations import refuse_per_query
from .selector import Selector

Kinds = Mapping[str, tuple[Tower, str, int]]


def kinds_of(towers: Mapping[str, Tower]) -> Kinds:
    """Return the tower, the kind and the layer of every site that a model can have."""
    return {site: (tower, kind, layer) for tower in towers.values() for site, kind, layer in tower.sites()}


# The fields that the weights of a selector depend on; a trained selector is kept if none of them changes.
_WEIGHTS = ("scorer", "scorer_options", "estimator", "estimator_options", "baseline", "baseline_options", "per_head")


def name_scorers(resolved: Mapping[str, SiteConfig], kinds: Kinds) -> dict[str, SiteConfig]:
    """Replace the scorer ``"auto"`` by the name of the scorer that suits the kind of site."""
    return {
        site: replace(config, scorer=_suitable_scorer(*kinds[site][:2])) if config.scorer == AUTO else config
        for site, config in resolved.items()
    }


def _suitable_scorer(tower: Tower, kind: str) -> str:
    """Return the scorer that was measured to find relevant positions at such a site (``results/compare``)."""
    if kind != "inputs":
        return "linear"
    # No layer has mixed the rows yet: from a single patch, a part of an object cannot be told from clutter, and in embeddings that
    # were never trained for it, no direction separates the informative tokens.
    return "conv" if tower.has_patches else "mlp"


def build_selector(site: str, config: SiteConfig, tower: Tower, kind: str, target_size: int, classes: int) -> Selector:
    """Build a new selector for one site.

    Raises:
        HardAttentionError: if the scorer, estimator or attention implementation cannot serve the site.
    """
    scorer = registry.load("scorers", config.scorer)
    _check_inputs(site, config, tower, kind, scorer)
    per_query = scorer.per_query or (tower.causal and kind == "self")
    _check_choice(site, config, tower, kind, scorer, per_query)
    _check_implementation(site, tower, kind, per_query)
    cross = kind == "cross"
    protected = Protected() if per_query else source_protected(tower) if cross else tower.protected
    selector = Selector(
        site,
        config,
        hidden_size=getattr(tower.config, "num_channels", 3)
        if scorer.needs_pixels
        else tower.source_size
        if cross
        else tower.hidden_size,
        query_size=tower.hidden_size,
        heads=tower.heads,
        protected=protected,
        causal=tower.causal and kind == "self",
        target_size=target_size,
        classes=classes,
    )
    selector.scorer.prefix = tower.protected.first
    if config.estimator == "soft":
        selector.requires_grad_(False)  # it never chooses, so distributed training must not wait for its gradient
    _check_execution(site, config, selector)
    return selector


def reusable(selector: Any, config: SiteConfig, built: Selector) -> bool:
    """Return whether an existing selector can serve ``config``, so that its trained weights are kept."""
    same = all(getattr(selector.config, name) == getattr(config, name) for name in _WEIGHTS)
    return same and selector.sizes == built.sizes and selector.protected == built.protected


def source_protected(tower: Tower) -> Protected:
    """Return the protected rows among those that the tower's cross-attention reads."""
    return Protected(*tower.spec.source_protected)


def _check_inputs(site: str, config: SiteConfig, tower: Tower, kind: str, scorer: Any) -> None:
    first = tower.protected.first
    if scorer.needs_cls and (not first or kind == "cross" or tower.causal):
        raise HardAttentionError(
            f"scorer '{config.scorer}' reads a CLS token; there is none among the candidates of '{site}'. Use another scorer."
        )
    if scorer.needs_grid and (kind != "inputs" or not tower.reads_images):
        raise HardAttentionError(
            f"scorer '{config.scorer}' reads a whole grid of patches; '{site}' has none. Use it at 'vision.inputs', or another scorer here."
        )
    if scorer.needs_pixels and (not tower.has_patches or kind != "inputs"):
        raise HardAttentionError(
            f"scorer '{config.scorer}' reads the pixels of an image; '{site}' has none. Use it at 'vision.inputs' of an image model, or "
            "another scorer here."
        )
    if scorer.needs_pixels and "class" in registry.load("estimators", config.estimator).needs:
        raise HardAttentionError(
            f"scorer '{config.scorer}' reads pixels, before any patch is embedded at '{site}'; the head of estimator '{config.estimator}' reads "
            "embedded patches. Use scorer 'conv', or another estimator."
        )


def _check_choice(site: str, config: SiteConfig, tower: Tower, kind: str, scorer: Any, per_query: bool) -> None:
    rows = kind in ("tokens", "inputs")
    if rows and (scorer.per_query or config.per_head):
        what = f"scorer '{config.scorer}' selects per query" if scorer.per_query else "per_head=True selects per head"
        raise HardAttentionError(
            f"{what}; '{site}' drops whole tokens, with one selection per row. Use it at a 'self' or 'cross' site."
        )
    if config.scorer_options.get("monotonic") and scorer.per_query and kind != "cross":
        raise HardAttentionError(
            f"monotonic=True at '{site}' reads a source in order; queries that select from their own row have none. Use it at a 'cross' site."
        )
    if tower.spec.prompt and kind == "self":
        _check_prompt_keys(site, config, tower, scorer)
    if tower.spec.prompt and config.pack:
        raise HardAttentionError(
            f"pack=True is not supported at '{site}'; the cache of a decoder holds a padded batch. Leave pack out."
        )
    if scorer.sequential and tower.causal and kind == "self":
        raise HardAttentionError(
            f"scorer '{config.scorer}' makes one selection per row, glimpse by glimpse; at '{site}' each query selects from its past. Use another scorer here."
        )
    if config.share_selection and (rows or per_query):
        what = (
            "drops rows, once for all layers" if rows else "selects for each query, and other layers have other queries"
        )
        raise HardAttentionError(
            f"share_selection=True at '{site}', which {what}; only 'self' or 'cross' sites that make one selection for all queries of a row can "
            "share it between layers. Leave it False here."
        )


def _check_prompt_keys(site: str, config: SiteConfig, tower: Tower, scorer: Any) -> None:
    """Check a decoder's ``self`` site, whose keys in the cache are the same for all later queries and for all heads."""
    if scorer.per_query or config.per_head:
        what = f"scorer '{config.scorer}' selects per query" if scorer.per_query else "per_head=True selects per head"
        raise HardAttentionError(
            f"{what}; '{site}' keeps the keys of a prompt in the cache, with one selection for all later tokens and all heads. Use a "
            "scorer that reads only the keys, and per_head=False."
        )
    window = tower.window(int(site.rsplit(".", 1)[1]))
    if window is not None:
        raise HardAttentionError(
            f"'{site}' belongs to a layer with a sliding window of {window}, whose cache forgets the prompt by itself. Choose the sites of "
            "layers with full attention, or 'tokens' and 'inputs' sites."
        )


def _check_implementation(site: str, tower: Tower, kind: str, per_query: bool) -> None:
    if per_query:
        refuse_per_query(tower.config._attn_implementation, tower.attention_spec(kind), site)


def _check_execution(site: str, config: SiteConfig, selector: Selector) -> None:
    gathered = config.execution == "gathered" and config.estimator != "soft"
    if gathered and not selector.estimator.trains_gathered and selector.learned:
        raise HardAttentionError(
            f"execution='gathered' at '{site}' leaves estimator '{config.estimator}' without a gradient; it needs the dropped positions. "
            "Use execution='auto' (masked in training, gathered in evaluation) or a score-function estimator."
        )


def shared_choices(resolved: Mapping[str, SiteConfig], kinds: Kinds) -> dict[str, str]:
    """Return a dict from each site that shares the choice of an earlier one to that site.

    Both are of the same tower and kind and have the same configuration, and no rows are dropped between them.
    """
    leaders: dict[str, str] = {}
    choosing: list[str] = []
    for site in sorted((site for site in resolved if resolved[site].share_selection), key=lambda site: kinds[site][2]):
        tower, kind, _ = kinds[site]
        alike = (
            other
            for other in choosing
            if kinds[other][0] is tower
            and kinds[other][1] == kind
            and resolved[other] == resolved[site]
            and not _drops_between(resolved, kinds, other, site)
        )
        leader = next(alike, None)
        if leader is None:
            choosing.append(site)
        else:
            leaders[site] = leader
    return leaders


def _drops_between(resolved: Mapping[str, SiteConfig], kinds: Kinds, leader: str, site: str) -> bool:
    """Return whether the tower's rows change between two ``self`` sites; the rows that ``cross`` sites read never change."""
    (tower, kind, start), (_, _, end) = kinds[leader], kinds[site]
    return kind == "self" and any(f"{tower.name}.tokens.{layer}" in resolved for layer in range(start, end))
