"""The layer's own attention: each query keeps the positions that it would attend to most."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import Scorer


class Attention(Scorer):
    """Score each pair of query and position by the host attention's logit: ``s_qn = a_h q_q . k_n``, the mean over heads when they
    share a choice. Position biases are left out.

    A trained soft model thus starts with a meaningful choice, and the only new parameter is the scale ``a`` (initially 1).
    With ``per_head`` it is top-k attention; with budget 1 it is classic hard attention, drawn from the attention itself.

    Cost: none besides the attention's own logits, which are computed once, for the choice and for the weights, and the keys of all
    positions.
    Source: Xu et al. 2015, "Show, Attend and Tell", section 4.1; Gupta et al. 2021, "Memory-efficient Transformers via Top-k
    Attention", arXiv:2106.06899.
    """

    needs_positions = False
    per_query = True
    reads_logits = True
    features = 0

    def __init__(self, hidden_size: int, query_size: int, heads: int = 1):
        super().__init__(hidden_size, query_size, heads)
        self.scale = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def score(self, features: Tensor, queries: Tensor | None = None) -> Tensor:
        logits = features.float()
        logits = logits if self.heads > 1 else logits.mean(1, keepdim=True)
        return logits * self.scale.float()[:, None, None]
