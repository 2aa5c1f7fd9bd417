"""Each query makes its own choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..options import Width
from . import Projections, Scorer


class QueryKey(Scorer):
    """Score each pair of query and position: ``s_qn = (Wq norm(x_q)) . (Wk norm(x_n)) / sqrt(d)``, with its own small projections.

    With budget 1 on cross-attention this is classic hard attention: the output is one value vector.

    Args:
        size: d, width of the projections per head, in [1, 8192].
        monotonic: a query starts from the first position that the previous query kept, for transduction.

    Cost: d multiplications per pair of query and position; monotonic choices are made one query after the other. Source: Show, Attend
    and Tell (Xu et al., 2015), section 4.1; monotonic: Wu & Cotterell 2019, arXiv:1905.06319, section 3.
    """

    needs_positions = False
    per_query = True

    def __init__(self, hidden_size: int, query_size: int, heads: int = 1, size: Width = 16, monotonic: bool = False):
        super().__init__(hidden_size, query_size, heads)
        self.size, self.monotonic = size, monotonic
        self.features = size + monotonic
        self.query_weight = nn.Parameter(torch.empty(heads * size, query_size))
        self.key_weight = nn.Parameter(torch.empty(heads * size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query_weight, std=self.query_size**-0.5)
        nn.init.normal_(self.key_weight, std=self.hidden_size**-0.5)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        keys = self._project(states, self.key_weight)
        return nn.functional.pad(keys, (0, 1)) if self.monotonic else keys

    def score(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        if queries is None:
            raise TypeError("QueryKey.score needs queries [B, Q, Dq].")
        return (
            self._project(queries, self.query_weight) @ features[..., : self.size].transpose(-1, -2) * self.size**-0.5
        )

    def _project(self, states: Tensor, weight: Tensor) -> Tensor:
        states = nn.functional.rms_norm(states.float(), states.shape[-1:])
        return nn.functional.linear(states, weight.float()).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
