"""A small MLP on the position's state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..options import Width
from . import Projections, Scorer


class Mlp(Scorer):
    """Score each position by a two-layer MLP: ``s_n = W2 gelu(W1 norm(x_n) + b1) + b2``.

    Args:
        hidden: width of the hidden layer, in [1, 8192].

    Cost: D * hidden multiplications per position. Source: DynamicViT (Rao et al., 2021), equation 4, local branch.
    """

    needs_positions = False

    def __init__(self, hidden_size: int, query_size: int, heads: int = 1, hidden: Width = 64):
        super().__init__(hidden_size, query_size, heads)
        self.weight_in = nn.Parameter(torch.empty(hidden, hidden_size))
        self.bias_in = nn.Parameter(torch.empty(hidden))
        self.weight_out = nn.Parameter(torch.empty(heads, hidden))
        self.bias_out = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_in, std=self.hidden_size**-0.5)
        nn.init.zeros_(self.bias_in)
        nn.init.normal_(self.weight_out, std=0.02)
        nn.init.zeros_(self.bias_out)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        states = nn.functional.rms_norm(states.float(), (self.hidden_size,))
        hidden = nn.functional.gelu(nn.functional.linear(states, self.weight_in.float(), self.bias_in.float()))
        scores = nn.functional.linear(hidden, self.weight_out.float(), self.bias_out.float())
        return scores.transpose(1, 2).unsqueeze(-1)
