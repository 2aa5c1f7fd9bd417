"""Do two models (two seeds, two checkpoints) keep the same positions?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..modes import evaluating
from ..recording import Recording, record
from .measures import chance_overlap


def jaccard(one: Recording, other: Recording) -> dict[str, dict[str, float]]:
    """Compare the first selections at each common site, mean over rows: ``jaccard``, and ``chance`` for choices of the same size.

    Protected positions (CLS, ``</s>``) are not part of the choice and are not counted.
    """
    common = [site for site in one.sites if site in other.sites]
    if not common:
        raise HardAttentionError(
            f"the recordings share no site ({', '.join(one.sites)} and {', '.join(other.sites)}); compare models with the same sites."
        )
    found = {}
    for site in common:
        a, b, places = _choices(one, other, site)
        both, either = (a & b).sum(-1), (a | b).sum(-1)
        rows = torch.where(either > 0, both / either.clamp(min=1), 1.0)
        sizes = zip(places.tolist(), a.sum(-1).tolist(), b.sum(-1).tolist(), strict=True)
        chance = [chance_overlap(n, k, m) for n, k, m in sizes]
        found[site] = {"jaccard": float(rows.mean()), "chance": sum(chance) / len(chance)}
    return found


def seed_agreement(recordings: list[Recording]) -> dict[str, dict[str, float]]:
    """Average ``jaccard`` over all pairs of recordings of the same batch by models of different seeds."""
    pairs = [jaccard(one, other) for one, other in combinations(recordings, 2)]
    if not pairs:
        raise HardAttentionError(
            f"{len(recordings)} recording is not enough; agreement between seeds needs at least 2."
        )
    return {
        site: {name: sum(pair[site][name] for pair in pairs) / len(pairs) for name in ("jaccard", "chance")}
        for site in pairs[0]
    }


@dataclass
class Difference:
    """The differences between the selections of two models at one site, on one batch.

    Attributes:
        site: its name. jaccard, chance: see ``jaccard``.
        first_only, second_only, both: bool ``[B, P]``, positions kept by one or both. order: rows from the most to the least changed.
    """

    site: str
    jaccard: float
    chance: float
    first_only: Tensor
    second_only: Tensor
    both: Tensor
    order: list[int]

    def __str__(self) -> str:
        gone, new = int(self.first_only.sum()), int(self.second_only.sum())
        return (
            f"{self.site}: both keep {int(self.both.sum())} positions, only the first {gone}, only the second {new}; "
            f"Jaccard {self.jaccard:.2f}, by chance {self.chance:.2f}"
        )


@torch.no_grad()
def selection_diff(first: nn.Module, second: nn.Module, batch: Mapping[str, Any]) -> list[Difference]:
    """Compare what two checkpoints keep on the same batch, site by site; ``overlay.difference_overlay`` draws the result."""
    recordings = []
    for model in (first, second):
        with evaluating(model), record(model) as recording:
            model(**batch)
        recordings.append(recording)
    one, other = recordings
    found = []
    for site, values in jaccard(one, other).items():
        a, b, _ = _choices(one, other, site)
        order = (a ^ b).sum(-1).argsort(descending=True, stable=True).tolist()
        found.append(Difference(site, values["jaccard"], values["chance"], a & ~b, b & ~a, a & b, order))
    return found


def _choices(one: Recording, other: Recording, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return both choices as bool ``[rows, P]``, one row per sample, head and query, without protected positions; places per row."""
    first, second = one[site][0], other[site][0]
    kept = [one.kept(first, choice=True), other.kept(second, choice=True)]
    if kept[0].shape[-1] != kept[1].shape[-1]:
        raise HardAttentionError(
            f"'{site}' has {kept[0].shape[-1]} positions in one recording and {kept[1].shape[-1]} in the other; record the same batch."
        )
    shape = torch.broadcast_shapes(kept[0].shape, kept[1].shape)
    entry = next(
        selection for selection in one if one.tower(selection.site) == one.tower(site)
    )  # before anything was dropped
    free = entry.valid if entry.protected is None else entry.valid & ~entry.protected
    places = free.flatten(1, 2).any(1).sum(-1)[:, None, None].expand(shape[:-1]).flatten()
    return kept[0].expand(shape).flatten(0, 2), kept[1].expand(shape).flatten(0, 2), places
