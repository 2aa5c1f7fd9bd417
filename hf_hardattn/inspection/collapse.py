"""Find selectors that have collapsed: sites that keep everything, or the same positions for every input."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.selection import Selection
from ..models import family_of
from ..modes import evaluating
from ..recording import record, replay, selectors
from ..unwrapping import refuse_other_than_batch, refuse_sharded, unwrap
from .random_control import drawn_like

# Ratio of the scores' variance between inputs to that between positions, below which the choice does not depend on the input.
_INDEPENDENT = 1e-3
_SAME = 0.999
# For the comparison with chance: draws at a site, the fewest examples, and by how many standard errors the loss must be larger.
_DRAWS, _EXAMPLES, _SIGMAS = 4, 8, 3.0


@dataclass(frozen=True)
class Collapse:
    """A site that does not choose, and the remedy.

    Attributes:
        site: its name.
        kind: ``keeps_all`` | ``keeps_nothing`` | ``position_constant`` | ``input_independent`` | ``worse_than_random`` | ``dead``.
        message: what was found, and the remedy.
    """

    site: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"'{self.site}' {self.message}"


_MESSAGES = {
    "keeps_all": (
        "keeps every position that it may drop, so it selects nothing. Lower its budget (a schedule may still be at its start: call set_step), "
        "or raise the threshold."
    ),
    "keeps_nothing": (
        "keeps a single position in every row, although the scores decide how many are kept. Lower the threshold; if a learned rate fell to zero, use a "
        "Lagrangian target or a schedule that starts at 1.0."
    ),
    "position_constant": (
        "keeps the same positions in every row. Start from a trained soft model, let the budget fall from 1.0 (recipe='robust'), and compare "
        "with scorer 'static': if that is as good, the input does not matter here."
    ),
    "input_independent": (
        "gives almost the same scores for every input. Raise the learning rate of the selectors or warm them up alone "
        "(selector_warmup_steps), add exploration, or use a scorer that sees more ('mlp', 'conv')."
    ),
    "worse_than_random": (
        "keeps positions that are worse than random selection: the loss is {own:.4g}, and {random:.4g} with as many random positions, on "
        "{examples} examples and {draws} draws. Continue training with exploration, or train again from a trained soft model with "
        "recipe='robust'; this also happens with a scorer that was trained at another site, budget or resolution."
    ),
    "dead": (
        "gets no gradient: its scorer cannot learn. Its scores may be saturated (backward_temperature='adaptive'), its budget may keep "
        "everything, or no later layer may read what it selects."
    ),
}


def find_collapse(model: nn.Module, batches: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> list[Collapse]:
    """Find the sites that do not choose, based on the positions they keep and on whether their scorers get a gradient.

    Args:
        model: a model with hard attention; its mode, gradients and weights are not changed.
        batches: a batch of keyword inputs, or several, with at least two rows in total to tell constant choices from good ones.
            With labels, the gradient is checked too, and with eight examples or more the selection is compared with random
            selection of as many positions.

    Returns:
        findings, in the order of the sites; empty if nothing is wrong.

    Raises:
        HardAttentionError: no sites, or weights that are sharded by FSDP2.
    """
    model = unwrap(model)
    refuse_sharded(model, "find_collapse")
    several = not isinstance(batches, (Mapping, Tensor)) and isinstance(batches, Iterable)
    given: Any = batches
    data: list[Any] = list(given) if several else [given]
    for batch in data:
        refuse_other_than_batch(batch, "find_collapse")
    made: dict[str, list[Selection]] = {}
    found: list[Collapse] = []
    with torch.no_grad(), evaluating(model):
        for batch in data:
            with record(model) as selections:
                model(**batch)
            for selection in selections:
                made.setdefault(selection.site, []).append(selection)
        chance = {
            site: _beside_chance(model, site, data)
            for site, selector in selectors(model).items()
            if not selector.keeps_all and not selector.scorer.draws
        }
    dead = _dead(model, data[0])
    for site, selector in selectors(model).items():
        kinds = _kinds(made.get(site, []), selector.data_dependent)
        found += [Collapse(site, kind, _MESSAGES[kind]) for kind in kinds]
        numbers = chance.get(site)
        if numbers is not None:
            found.append(Collapse(site, "worse_than_random", _MESSAGES["worse_than_random"].format(**numbers)))
        found += [Collapse(site, "dead", _MESSAGES["dead"])] if site in dead else []
    return found


def _beside_chance(model: nn.Module, site: str, data: list[Any]) -> dict[str, Any] | None:
    """Return the losses of a site whose choice is worse than chance at the same budget, while all other sites choose freely; None if
    it is not worse, or if the batches do not suffice to tell."""
    own, random = [], []
    generator = torch.Generator().manual_seed(0)
    for batch in data:
        with record(model) as selections:
            known = _losses(model, batch, model(**batch))
        if known is None or site not in selections.sites:
            return None
        drawn = []
        for _ in range(_DRAWS):
            with replay(model, [drawn_like(selection, generator) for selection in selections[site]]):
                drawn.append(_losses(model, batch, model(**batch)))
        own.append(known)
        random.append(torch.stack(drawn).mean(0))
    before, beside = torch.cat(own), torch.cat(random)
    lost = before - beside
    if len(lost) < _EXAMPLES or not lost.isfinite().all() or lost.mean() <= _SIGMAS * lost.std() / len(lost) ** 0.5:
        return None
    return {"own": before.mean().item(), "random": beside.mean().item(), "examples": len(lost), "draws": _DRAWS}


def _losses(model: nn.Module, batch: Mapping[str, Any], output: Any) -> Any:
    """Return the task loss of each example, fp32 ``[B]`` on the CPU; None if the batch has no labels."""
    family = family_of(model)
    losses = None if family is None else family.example_loss(model, dict(batch), output)
    return None if losses is None else losses.detach().float().cpu()


def _kinds(selections: list[Selection], data_dependent: bool) -> list[str]:
    if not selections:
        return []
    ratio = torch.cat([s.kept_ratio.flatten() for s in selections])
    if ratio.min() > _SAME:
        return ["keeps_all"]
    counts = torch.cat(
        [(s.mask if s.protected is None else s.mask & ~s.protected).sum(-1).flatten() for s in selections]
    )
    if data_dependent and counts.max() <= 1:  # one position is kept whatever the scores say
        return ["keeps_nothing"]
    masks = torch.cat([_rows(s.mask, s) for s in selections])
    if (
        len(masks) < 2
        or len({s.mask.shape[-1] for s in selections}) > 1
        or any(s.positions is not None for s in selections)
    ):
        return []  # nothing to compare, or indices that stand for other positions in every row
    if (masks == masks[:1]).all():
        return ["position_constant"]
    scores = torch.cat([_rows(s.scores, s) for s in selections])
    scores = scores - scores.mean(-1, keepdim=True)
    if scores.var(0).mean() < _INDEPENDENT * scores.mean(0).var():
        return ["input_independent"]
    return []


def _rows(values: Tensor, selection: Selection) -> Tensor:
    """Flatten ``[B, H, Q, N]`` to one row per example, head and query, ``[B * H * Q, N]``; entries that are not valid become 0."""
    return torch.where(selection.valid, values.expand(selection.mask.shape), 0).flatten(0, -2)


def _dead(model: nn.Module, batch: Mapping[str, Any]) -> set[str]:
    """Return the sites whose scorer has parameters but gets no gradient from the training loss; no sites if there is no loss."""
    twin = copy.deepcopy(model).train()
    for selector in selectors(twin).values():
        selector.annealing = None  # a budget that still keeps everything gives no gradient, which is not an error
    output = twin(**batch)
    loss = output.get("loss") if hasattr(output, "get") else None
    if loss is None:
        return set()
    loss.backward()
    return {
        site
        for site, selector in selectors(twin).items()
        if selector.learned
        and selector.config.estimator != "soft"
        and all(p.grad is None or not p.grad.any() for p in selector.scorer.parameters())
    }
