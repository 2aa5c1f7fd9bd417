"""Each query chooses for itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import Base, Projections


class QueryKey(Base):
    """Score each pair of query and position: ``s_qn = (Wq norm(x_q)) . (Wk norm(x_n)) / sqrt(d)``, with its own small projections.

    With budget 1 on cross-attention this is the classic hard attention: the output is one value vector.

    Args:
        size: d, width of the projections per head.

    Cost: d multiplications per pair of query and position. Source: Show, Attend and Tell (Xu et al., 2015), section 4.1.
    """

    per_query = True

    def __init__(self, hidden_size: int, query_size: int, heads: int = 1, size: int = 16):
        super().__init__(hidden_size, query_size, heads)
        self.size = self.features = size
        self.query_weight = nn.Parameter(torch.empty(heads * size, query_size))
        self.key_weight = nn.Parameter(torch.empty(heads * size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query_weight, std=self.query_size**-0.5)
        nn.init.normal_(self.key_weight, std=self.hidden_size**-0.5)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        return self._project(states, self.key_weight)

    def score(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        if queries is None:
            raise TypeError("QueryKey.score needs queries [B, Q, Dq].")
        return self._project(queries, self.query_weight) @ features.transpose(-1, -2) * self.size**-0.5

    def _project(self, states: Tensor, weight: Tensor) -> Tensor:
        states = nn.functional.rms_norm(states.float(), states.shape[-1:])
        return nn.functional.linear(states, weight.float()).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
