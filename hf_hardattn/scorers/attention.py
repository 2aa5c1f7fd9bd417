"""The layer's own attention: each query keeps what it would attend to most."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import Base, Projections


class Attention(Base):
    """Score each pair of query and position by the host attention's logit: ``s_qn = a_h q_q . k_n``, the mean over heads when they
    share a choice. Position biases are left out.

    A trained soft model starts with a choice that means something, and nothing is learned anew but the scale ``a`` (1 at first).
    With ``per_head`` it is top-k attention; with budget 1 the classic hard attention, drawn from the attention itself.

    Cost: the key projection of the layer once more, and D multiplications per pair of query and position.
    Source: Xu et al. 2015, "Show, Attend and Tell", section 4.1; Gupta et al. 2021, "Memory-efficient Transformers via Top-k
    Attention", arXiv:2106.06899.
    """

    per_query = True
    needs_projections = True

    def __init__(self, hidden_size: int, query_size: int, heads: int = 1):
        super().__init__(hidden_size, query_size, heads)
        self.features = query_size + 1
        self.scale = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        """Each key as the queries' states see it: ``q(x) . k = (W x + b) . k = x . (W' k) + b . k``."""
        if projections is None:
            raise TypeError("Attention.keys needs the host attention's projections.")
        basis = torch.eye(self.query_size, dtype=states.dtype, device=states.device)
        origin = projections.query(torch.zeros_like(basis[None, :1])).float()  # b, [1, H, 1, d]
        weight = projections.query(basis[None]).float() - origin  # W', [1, H, Dq, d]
        seen = projections.key(states).float() @ torch.cat((weight, origin), 2).transpose(-1, -2)
        return seen if self.heads > 1 else seen.mean(1, keepdim=True)

    def score(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        if queries is None:
            raise TypeError("Attention.score needs queries [B, Q, Dq].")
        states, constant = features[..., :-1], features[..., -1].unsqueeze(2)
        logits = queries.float().unsqueeze(1) @ states.transpose(-1, -2) + constant
        return logits * self.scale.float()[:, None, None]
