"""Budgets: how many positions a row keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import HardAttentionError

_PARTS = 1_000_000  # ratios are held in millionths, so that ceil(0.1 * 30) is 3 and not 4


@dataclass(frozen=True)
class Budget:
    """How many of the valid candidates a row keeps.

    Attributes:
        kind: ``count`` (int >= 1 positions), ``ratio`` (share of the valid positions in (0, 1], at least one position),
            ``threshold`` (positions with sigmoid(score) > value), ``top_p`` (smallest set whose softmax mass reaches value).
        value: the number.
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, budget: Any, where: str) -> Budget:
        """Read ``8``, ``0.25``, ``"threshold:0.5"`` or ``"top_p:0.9"``; ``where`` names the place in an error."""
        if isinstance(budget, bool):
            raise HardAttentionError(f"budget={budget!r} is not a budget at '{where}'; {_RULE}")
        if isinstance(budget, int):
            if budget < 1:
                raise HardAttentionError(
                    f"budget={budget} is out of range at '{where}'; an int budget counts positions to KEEP, >= 1."
                )
            return cls("count", budget)
        if isinstance(budget, float):
            if not 0.0 < budget <= 1.0:
                raise HardAttentionError(
                    f"budget={budget} is out of range at '{where}'; a float budget is the ratio to KEEP, in (0, 1]. An int counts positions."
                )
            return cls("ratio", budget)
        if isinstance(budget, str):
            kind, _, text = budget.partition(":")
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if kind in ("threshold", "top_p"):
                if not 0.0 < value < 1.0:
                    raise HardAttentionError(
                        f"budget={budget!r} is out of range at '{where}'; the number behind '{kind}:' lies in (0, 1)."
                    )
                return cls(kind, value)
        raise HardAttentionError(f"budget={budget!r} is not a budget at '{where}'; {_RULE}")

    @property
    def data_dependent(self) -> bool:
        """Whether the number kept depends on the scores (then no static bound below N exists)."""
        return self.kind in ("threshold", "top_p")

    def slots(self, n: int) -> int:
        """Static upper bound of positions kept among ``n`` candidates."""
        if self.kind == "count":
            return min(int(self.value), n)
        if self.kind == "ratio":
            return min(n, max(1, -(-round(self.value * _PARTS) * n // _PARTS)))
        return n

    def count(self, scores: Tensor, valid: Tensor) -> Tensor:
        """Positions to keep per row, int64 ``[...]`` in [0, valid]: 0 only where nothing is valid.

        Args:
            scores: fp32 ``[..., N]``.
            valid: bool ``[..., N]``.
        """
        available = valid.sum(-1)
        if self.kind == "count":
            k = torch.full_like(available, int(self.value))
        elif self.kind == "ratio":
            k = (available * round(self.value * _PARTS) + _PARTS - 1) // _PARTS
        elif self.kind == "threshold":
            k = ((scores.sigmoid() > self.value) & valid).sum(-1)
        else:
            p = scores.masked_fill(~valid, float("-inf")).softmax(-1).nan_to_num(0.0)
            reached = p.sort(-1, descending=True).values.cumsum(-1)
            k = (reached < self.value).sum(-1) + 1
        return torch.minimum(k.clamp(min=1), available)


_RULE = 'use an int >= 1 (positions), a float in (0, 1] (ratio to KEEP), "threshold:t" or "top_p:p".'
