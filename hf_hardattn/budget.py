"""Budgets: how many positions a row keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .amounts import MOST_COUNT, is_marked, read_amount, write_amount
from .errors import HardAttentionError, shown
from .schedules import Sampled, Schedule, read_schedule, write_schedule

# What a user may write as a budget: a count, a ratio, "threshold:t", "top_p:p", a schedule, or the JSON form of one of them.
BudgetLike: TypeAlias = int | float | str | Mapping[str, Any]
_PARTS = 1_000_000  # ratios are stored in millionths, so that ceil(0.1 * 30) is 3 and not 4


@dataclass(frozen=True)
class Budget:
    """How many of the valid candidates a row keeps.

    Attributes:
        kind: ``count`` (int >= 1 positions), ``ratio`` (share of the valid positions in (0, 1], at least one position),
            ``threshold`` (positions with sigmoid(score) > value), ``top_p`` (smallest set whose softmax mass reaches value).
        value: the number.
        least: ratio in [0, 1]; minimum share to keep while a count or a ratio is annealed.
    """

    kind: str
    value: float
    least: float = 0.0

    @classmethod
    def parse(cls, budget: Any, where: str) -> Budget:
        """Read ``8``, ``0.25``, ``"threshold:0.5"``, ``"top_p:0.9"``, or JSON's ``{"count": 8}``, ``{"ratio": 0.25}``.

        Args:
            where: place, for the error message.

        Raises:
            HardAttentionError: if the budget is none of these, or out of range.
        """
        budget = read_amount(budget, "budget", where)
        if isinstance(budget, int) and not isinstance(budget, bool):
            if not 1 <= budget <= MOST_COUNT:
                raise _out_of_range(
                    budget, where, f"an int budget is the number of positions to KEEP, >= 1 and <= {MOST_COUNT}."
                )
            return cls("count", budget)
        if isinstance(budget, float):
            if not 0.0 < budget <= 1.0:
                raise _out_of_range(
                    budget,
                    where,
                    "a float budget is the ratio to KEEP, in (0, 1]. Use an int for a number of positions.",
                )
            return cls("ratio", budget)
        kind, _, number = budget.partition(":") if isinstance(budget, str) else ("", "", "")
        if kind not in ("threshold", "top_p"):
            raise HardAttentionError(f"budget={shown(budget)} is not a budget at {shown(where)}; {_RULE}")
        value = float(number) if _NUMBER.fullmatch(number) else -1.0
        if not 0.0 < value < 1.0:
            raise _out_of_range(budget, where, f"the number after '{kind}:' must be in (0, 1).")
        return cls(kind, value)

    @property
    def data_dependent(self) -> bool:
        """Whether the number of kept positions depends on the scores; no static bound below N exists then."""
        return self.kind in ("threshold", "top_p")

    def slots(self, n: int) -> int:
        """Return a static upper bound of the number of positions kept among ``n`` candidates."""
        if self.data_dependent:
            return n
        wanted = int(self.value) if self.kind == "count" else max(1, _share(self.value, n))
        return min(n, max(wanted, _share(self.least, n)) if self.least else wanted)

    def count(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Return the number of positions to keep per row, int64 ``[...]`` in [0, valid]; it is 0 only if no position is valid.

        Args:
            scores: fp32 ``[..., N]``.
            valid: bool ``[..., N]``.
        """
        available = valid.sum(-1)
        if self.kind == "count":
            k = torch.full_like(available, int(self.value))
        elif self.kind == "ratio":
            k = _share(self.value, available)
        elif self.kind == "threshold":
            k = ((scores.sigmoid() > self.value) & valid).sum(-1)
        else:
            p = scores.masked_fill(~valid, float("-inf")).softmax(-1).nan_to_num(0.0)
            reached = p.sort(-1, descending=True).values.cumsum(-1)
            k = (reached < self.value).sum(-1) + 1
        if self.least and not self.data_dependent:
            k = torch.maximum(k, _share(self.least, available))
        return torch.minimum(k.clamp(min=1), available)

    def ranks(self, slots: int, available: Tensor, protected: Tensor | int) -> Tensor:
        """Return which ranks a count or a ratio keeps if protected candidates rank first, with few operations for the GPU to launch.

        Args:
            slots: K, number of ranks: ``slots`` of the free candidates, plus the protected ones.
            available: int64 ``[..., 1]``, number of valid candidates of each row.
            protected: how many of them are protected, int64 ``[..., 1]``; or 0 or 1 for every row that has valid candidates.

        Returns:
            bool ``[..., K]``; True for the protected candidates of a row, and for as many others as ``count`` returns.
        """
        device = available.device
        if self.kind == "count":
            if isinstance(protected, Tensor):
                available = torch.minimum(protected + int(self.value), available)
            return available > torch.arange(slots, device=device)
        # rank - protected < ratio * (available - protected), in millionths; rounding up would need a division
        share = max(1, round(self.value * _PARTS))
        kept, start = available * share, 0
        if isinstance(protected, Tensor):
            kept = torch.add(kept, protected, alpha=_PARTS - share)
        else:
            start = -protected * (_PARTS - share)
        ranks = torch.arange(start, start + slots * _PARTS, _PARTS, device=device)
        return kept > (ranks.clamp(min=0) if start else ranks)


def _share(ratio: float, n: Any) -> Any:
    """Return ``ceil(ratio * n)`` for an int or an integer tensor."""
    return (n * round(ratio * _PARTS) + _PARTS - 1) // _PARTS


def read_budget(budget: Any, where: str) -> Any:
    """Return a budget in the form that a configuration stores: an int, a float, a string, a schedule of ratios, or a range of ratios.

    Args:
        budget: a Python value, or its JSON form.
        where: place, for the error message.

    Raises:
        HardAttentionError: if it is not a budget or out of range, or if a schedule or range does not consist of ratios.
    """
    if not isinstance(budget, Mapping) or is_marked(budget):
        Budget.parse(budget, where)
        return read_amount(budget, "budget", where)
    if is_sampled(budget):
        sampled = Sampled.parse(budget, where)
        return {"sample": [sampled.low, sampled.high]}
    schedule = read_schedule(budget, f"{where}, budget")
    for name in ("start", "end"):
        if not 0.0 < schedule[name] <= 1.0:
            raise _out_of_range(
                schedule[name],
                where,
                f"a schedule's {name} is the ratio to KEEP, in (0, 1]; a count cannot be scheduled.",
            )
    return schedule


def is_sampled(budget: Any) -> bool:
    """Return whether every training step draws its own ratio: ``{"sample": [0.1, 1.0]}``."""
    return isinstance(budget, Mapping) and "sample" in budget


def budget_schedule(budget: Any, where: str) -> Schedule | Sampled | None:
    """Return the ratio over optimizer steps of a budget in a configuration; None if the budget is constant."""
    if not isinstance(budget, Mapping) or is_marked(budget):
        return None
    return Sampled.parse(budget, where) if is_sampled(budget) else Schedule.parse(budget, where)


def final_budget(budget: Any) -> Any:
    """Return the budget in evaluation: the end of a schedule, the lower end of a range, or otherwise the budget itself."""
    schedule = budget_schedule(budget, "budget")
    return budget if schedule is None else float(schedule.end)


def write_budget(budget: Any) -> Any:
    """Return the JSON form: counts, ratios and the steps of schedules are marked as such; strings and ranges are unchanged."""
    if is_sampled(budget):
        return {"sample": list(budget["sample"])}
    return write_schedule(budget) if isinstance(budget, Mapping) else write_amount(budget)


_NUMBER = re.compile(
    r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?"
)  # float() also reads "0_5", " 0.5 " and other scripts' digits
_RULE = (
    'use an int >= 1 (positions), a float in (0, 1] (ratio to KEEP), "threshold:t", "top_p:p", a schedule of ratios or {"sample": [low, high]}; '
    'in JSON {"count": 8} or {"ratio": 0.5}.'
)


def _out_of_range(budget: Any, where: str, rule: str) -> HardAttentionError:
    return HardAttentionError(f"budget={shown(budget)} is out of range at {shown(where)}; {rule}")
