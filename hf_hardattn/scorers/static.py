"""The same positions in every row: a control."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from ..options import Range
from . import Projections, Scorer


class Static(Scorer):
    """Score each position by its place alone: ``s_n = t_n``, one learned number per place and head. A control: it shows what a
    choice that does not depend on the input can reach.

    Args:
        positions: number of places with their own score, in [1, 2**20]; later places share the last score.

    Source: DynamicViT (Rao et al., 2021), Table 4, "static".
    """

    def __init__(
        self, hidden_size: int, query_size: int, heads: int = 1, positions: Annotated[int, Range(1, 2**20)] = 1024
    ):
        super().__init__(hidden_size, query_size, heads)
        self.table = nn.Parameter(torch.empty(heads, positions))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        place = positions.clamp(max=self.table.shape[1] - 1)
        return self.table.float()[:, place].transpose(0, 1).unsqueeze(-1)
