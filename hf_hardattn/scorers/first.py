"""The first positions of each row: a control."""

from __future__ import annotations

from torch import Tensor

from . import Projections, Scorer


class First(Scorer):
    """Score each position by its place, the first highest: ``s_n = -n``. A control: a fixed choice that does not read the input."""

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        return -positions.float()[:, None, :, None].expand(-1, self.heads, -1, -1)
