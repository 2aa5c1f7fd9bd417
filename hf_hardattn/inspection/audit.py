"""Find out what a model systematically keeps and drops, by subgroup of the rows and by group of positions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import HardAttentionError

CAUTION = (
    "A rate says what is computed on, not why: a group may be dropped more because it matters less to the task, because the data "
    "hold less of it, or because the selector never learned it. Compare the model's errors on the same groups before acting on it."
)


@dataclass
class Finding:
    """How often the places of one group are kept.

    Attributes:
        column, value: the group. rows: number of rows with places of the group. places: number of these places.
        rate: kept share of the group's places, mean over rows. rest: kept share of all other places, mean over rows that have some.
        error: standard error of ``rate - rest``; rows are the independent unit. notable: the difference exceeds chance.
        sentence: the same in words.
    """

    column: str
    value: str
    rows: int
    places: int
    rate: float
    rest: float
    error: float
    notable: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def audit(kept: Tensor, places: Tensor, groups: Mapping[str, Any], least: int = 8) -> list[Finding]:
    """Compare the kept rate of every group with that of everything else in its column.

    Args:
        kept: bool ``[B, P]``. places: bool ``[B, P]``, the candidates. groups: maps a column name to one value per row (a sequence
            of B: label, language, source), or one per place (int tensor ``[B, P]``, or a pair of it and the names of its values).
        least: smallest number of rows in a group; smaller groups are left out, since they support no conclusion.

    Returns:
        findings, the largest differences (in standard errors) first. ``notable`` means beyond Bonferroni's bound at 5 % over all
        groups; the bound assumes that the rows were drawn independently.
    """
    if kept.shape != places.shape:
        raise HardAttentionError(
            f"kept {tuple(kept.shape)} and places {tuple(places.shape)} differ; both must be [B, P]."
        )
    measured = []
    for column, given in groups.items():
        for value, inside, per_place in _members(given, places, column):
            measured += [
                (column, value, *found) for found in [_rates(kept, places, inside, per_place)] if found[0] >= least
            ]
    bound = _quantile(1 - 0.025 / max(1, len(measured)))
    found = [_finding(*row, bound=bound) for row in measured]
    return sorted(found, key=lambda f: abs(f.rate - f.rest) / max(f.error, 1e-12), reverse=True)


def position_groups(
    places: Tensor, thirds: Sequence[str] = ("first third", "middle third", "last third")
) -> tuple[Tensor, list[str]]:
    """Return the third of its row in which each place lies: an audit column that shows position bias."""
    rank = (places.cumsum(-1) - 1).clamp(min=0)
    third = (3 * rank / places.sum(-1, keepdim=True).clamp(min=1)).long().clamp(max=2)
    return third.masked_fill(~places, -1), list(thirds)


def border_groups(places: Tensor, down: int, across: int) -> tuple[Tensor, list[str]]:
    """Return border or inside, for places that end in a grid of ``down`` x ``across`` patches, after CLS and registers if any."""
    index = torch.arange(down * across)
    y, x = index // across, index % across
    border = (y == 0) | (y == down - 1) | (x == 0) | (x == across - 1)
    first = places.shape[1] - len(index)
    grid = torch.nn.functional.pad(torch.where(border, 0, 1), (first, 0), value=-1).expand(places.shape)
    return grid.masked_fill(~places.cpu(), -1), ["border", "inside"]


def rarity_groups(ids: Tensor, places: Tensor) -> tuple[Tensor, list[str]]:
    """Return rare, middling or frequent: thirds of the running text by how often the token occurs in these rows, ids ``[B, P]``."""
    counts = Counter(ids[places].tolist())
    third, before = {}, 0
    for token, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        third[token] = int(3 * (before + count / 2) / counts.total())  # third of the middle occurrence
        before += count
    kind = torch.tensor([[third.get(token, -1) for token in row] for row in ids.tolist()])
    return kind.masked_fill(~places, -1), ["rare tokens", "middling tokens", "frequent tokens"]


def length_groups(places: Tensor) -> list[str]:
    """Return short, medium or long for each row, in thirds."""
    lengths = places.sum(-1).float()
    low, high = lengths.quantile(torch.tensor([1 / 3, 2 / 3])).tolist()
    return ["short" if n <= low else "medium" if n <= high else "long" for n in lengths.tolist()]


def size_groups(objects: Tensor, places: Tensor) -> tuple[Tensor, list[str]]:
    """Return the size of the object at each place (small, medium or large, thirds by area) or background; ``objects``: bool ``[B, P]``."""
    area = objects.sum(-1).float()
    low, high = area[area > 0].quantile(torch.tensor([1 / 3, 2 / 3])).tolist()
    size = torch.where(area <= low, 0, torch.where(area <= high, 1, 2))[:, None].expand_as(objects)
    kind = torch.where(objects, size, 3)
    return kind.masked_fill(~places, -1), ["small objects", "medium objects", "large objects", "background"]


def _members(given: Any, places: Tensor, column: str) -> list[tuple[str, Tensor, bool]]:
    """Return the values of a column with their places, bool ``[B, P]``, and whether the values are per place and not per row."""
    kinds, names = given if isinstance(given, tuple) else (given, None)
    if isinstance(kinds, Tensor) and kinds.dim() == 2:
        if kinds.shape != places.shape:
            raise HardAttentionError(
                f"column {column!r} has shape {tuple(kinds.shape)}; it must have that of the positions, {tuple(places.shape)}."
            )
        values = kinds[places].unique().tolist()
        return [(names[v] if names else str(v), (kinds == v) & places, True) for v in values if v >= 0]
    rows = [str(value) for value in (kinds.tolist() if isinstance(kinds, Tensor) else kinds)]
    if len(rows) != len(places):
        raise HardAttentionError(
            f"column {column!r} has {len(rows)} values for {len(places)} rows; it needs one per row."
        )
    member = {value: torch.tensor([row == value for row in rows])[:, None] for value in dict.fromkeys(rows)}
    return [(value, where & places, False) for value, where in member.items()]


def _rates(kept: Tensor, places: Tensor, inside: Tensor, per_place: bool) -> tuple[int, int, float, float, float]:
    """Return the number of rows and places, the rate, the rate of the rest, and the standard error of their difference."""
    outside = places & ~inside
    one, one_rows = _row_rates(kept, inside)
    other, other_rows = _row_rates(kept, outside)
    if per_place:  # each row has both rates: a paired difference
        both = one_rows & other_rows
        gap = (one - other)[both]
        rate, rest = float(one[both].mean()) if both.any() else 0.0, float(other[both].mean()) if both.any() else 0.0
        error = float(gap.std() / math.sqrt(max(1, len(gap)))) if len(gap) > 1 else float("inf")
        return int(both.sum()), int(inside.sum()), rate, rest, error
    a, b = one[one_rows], other[other_rows]
    if len(a) < 2 or len(b) < 2:
        return (
            len(a),
            int(inside.sum()),
            float(a.mean()) if len(a) else 0.0,
            float(b.mean()) if len(b) else 0.0,
            float("inf"),
        )
    error = math.sqrt(float(a.var()) / len(a) + float(b.var()) / len(b))
    return len(a), int(inside.sum()), float(a.mean()), float(b.mean()), error


def _row_rates(kept: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    count = where.sum(-1)
    return (kept & where).sum(-1) / count.clamp(min=1), count > 0


def _quantile(probability: float) -> float:
    return float(math.sqrt(2) * torch.erfinv(torch.tensor(2 * probability - 1, dtype=torch.float64)))


def _finding(
    column: str, value: str, rows: int, places: int, rate: float, rest: float, error: float, *, bound: float
) -> Finding:
    gap = rate - rest
    notable = math.isfinite(error) and abs(gap) > bound * error and abs(gap) > 1e-9
    verdict = (
        f"{'more' if gap > 0 else 'less'} than the rest"
        if notable
        else "no different from the rest, as far as these rows tell"
    )
    spread = f" ± {bound * error:.1%}" if math.isfinite(error) else ""
    sentence = f"{column} = {value}: {rate:.1%} kept against {rest:.1%} elsewhere (difference {gap:+.1%}{spread}, {rows:,} rows): {verdict}."
    return Finding(column, value, rows, places, rate, rest, error, notable, sentence)
