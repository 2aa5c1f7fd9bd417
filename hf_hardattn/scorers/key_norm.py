"""The norm of the position's attention key, without parameters."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import Projections, Scorer


class KeyNorm(Scorer):
    """Score each position by the norm of its key: ``s_n = -|k_n|`` (or ``+|k_n|``), the mean over heads when they share a choice.

    A control that needs no training. Args: keep: ``"low"`` (default; keys of low norm attract attention) or ``"high"``.

    Cost: the key projection of the layer. Source: Devoto et al. (2024), "A simple and effective L2 norm-based strategy for KV
    cache compression".
    """

    needs_positions = False
    needs_projections = True

    def __init__(self, hidden_size: int, query_size: int, heads: int = 1, keep: Literal["low", "high"] = "low"):
        super().__init__(hidden_size, query_size, heads)
        self.sign = -1.0 if keep == "low" else 1.0

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        if projections is None:
            raise TypeError("KeyNorm.keys needs the host attention's projections.")
        norm = self.sign * projections.key(states).float().norm(dim=-1, keepdim=True)
        return norm if self.heads > 1 else norm.mean(1, keepdim=True)
