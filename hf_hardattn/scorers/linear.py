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
        states = states.float()
        # row by row, not as a matrix product: equal tokens then score equal to the last bit in any batch, with and without a cache
        scores = [(states * weight).sum(-1) for weight in self.weight.float()]
        # RMSNorm's factor on the scores, not on the states: what is normalised would be one more tensor of their size
        square, eps = torch.linalg.vector_norm(states, dim=-1).square(), torch.finfo(torch.float32).eps
        if torch.is_grad_enabled():
            scale = (square / self.hidden_size + eps).rsqrt()
            scaled = [score * scale + bias for score, bias in zip(scores, self.bias.float(), strict=True)]
        else:
            # the same with two operations less: in inference a GPU waits for each
            scale = torch.rsub(square, eps, alpha=-1.0 / self.hidden_size).rsqrt()
            scaled = [torch.addcmul(bias, score, scale) for score, bias in zip(scores, self.bias.float(), strict=True)]
        return (torch.stack(scaled, 1) if len(scaled) > 1 else scaled[0].unsqueeze(1)).unsqueeze(-1)
