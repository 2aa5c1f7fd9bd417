"""A random choice: the control that every learned choice must beat."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..distributions.noise import uniform
from ..options import Range
from . import Projections, Scorer


class Random(Scorer):
    """Score each position by uniform noise.

    Training draws new noise. Evaluation hashes the state and the place of the position: the choice is meaningless, but it is the
    same for a row by itself, in any batch, and with or without a decoding cache.

    Args:
        seed: in [0, 2**31); each seed gives another choice.
    """

    def __init__(
        self, hidden_size: int, query_size: int, heads: int = 1, seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    ):
        super().__init__(hidden_size, query_size, heads)
        self.seed = seed

    draws = True

    def draw(self, states: Tensor) -> Tensor:
        return uniform((len(states), self.heads, states.shape[1], 1), states.device)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        # Coarse bins: the same input gives the same hash, although the last bits are rounded differently at another batch size.
        bins = (states.float().detach().sum(-1) * 8).round().long()
        head = torch.arange(self.heads, device=states.device)[None, :, None]
        x = (bins * 1_000_003 + positions * 7_919)[:, None, :] + head * 104_729 + self.seed * 15_485_863
        for _ in range(2):
            x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
            x = ((x ^ (x >> 12)) * 0x297A2D39) & 0x7FFFFFFF
        return (x.float() / 0x7FFFFFFF).unsqueeze(-1)
