"""One linear map of the position's state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import Projections, Scorer


class Linear(Scorer):
    """Score each position by one direction per head: ``s_n = w_h . norm(x_n) + b_h``.

    The state is normalised to unit root mean square first: residual streams grow with depth, and the size of a state
    would otherwise set the temperature of the choice.

    Cost: D multiplications per position and head. Source: DynamicViT (Rao et al., 2021), section 3.2, without the MLP.
    """

    needs_positions = False

    def __init__(self, hidden_size: int, query_size: int, heads: int = 1):
        super().__init__(hidden_size, query_size, heads)
        self.weight = nn.Parameter(torch.empty(heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # near-uniform scores: the first choices explore, and the first gradients decide
        nn.init.normal_(self.weight, std=0.02 * self.hidden_size**-0.5)
        nn.init.zeros_(self.bias)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        states, weight, bias = states.float(), self.weight.float(), self.bias.float()[:, None]
        if not torch.is_grad_enabled():
            # few operations: a GPU waits for each
            states = nn.functional.rms_norm(states, (self.hidden_size,))
            return (_dots(states, weight) + bias).unsqueeze(-1)
        # RMSNorm's factor on the scores, not on the states: training would keep what is normalised, a tensor of their size
        scores = _dots(states, weight)
        square = torch.linalg.vector_norm(states, dim=-1).square() / self.hidden_size
        scale = (square + torch.finfo(square.dtype).eps).rsqrt()
        return (scores * scale.unsqueeze(1) + bias).unsqueeze(-1)


def _dots(states: Tensor, weight: Tensor) -> Tensor:
    """``[B, N, D]`` by ``[H, D]`` to ``[B, H, N]``."""
    # row by row, not as a matrix product: equal tokens then score equal to the last bit in any batch, with and without a cache
    if len(weight) == 1:
        return (states * weight).sum(-1).unsqueeze(1)
    return torch.stack([(states * head).sum(-1) for head in weight], 1)
