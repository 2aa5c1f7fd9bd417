"""One linear map of the position's state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import Projections, Scorer


class Linear(Scorer):
    """Score each position by one direction per head: ``s_n = w_h . norm(x_n) + b_h``.

    The state is first normalised to unit root mean square: residual streams grow with depth, and the norm of a state
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
        # Near-uniform scores, so that the first choices explore and the first gradients set the direction.
        nn.init.normal_(self.weight, std=0.02 * self.hidden_size**-0.5)
        nn.init.zeros_(self.bias)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        states, weight, bias = states.float(), self.weight.float(), self.bias.float()[:, None]
        if not torch.is_grad_enabled():
            # As few operations as possible, since launching them dominates on a GPU.
            states = nn.functional.rms_norm(states, (self.hidden_size,))
            return (_dots(states, weight) + bias).unsqueeze(-1)
        # Apply RMSNorm's factor to the scores and not to the states: otherwise training would keep a second tensor of their size.
        scores = _dots(states, weight)
        square = torch.linalg.vector_norm(states, dim=-1).square() / self.hidden_size
        scale = (square + torch.finfo(square.dtype).eps).rsqrt()
        return (scores * scale.unsqueeze(1) + bias).unsqueeze(-1)


def _dots(states: Tensor, weight: Tensor) -> Tensor:
    """Multiply ``[B, N, D]`` by ``[H, D]`` to ``[B, H, N]``."""
    # Row by row instead of a matrix product: equal tokens then get bit-identical scores in any batch, with and without a cache.
    if len(weight) == 1:
        return (states * weight).sum(-1).unsqueeze(1)
    return torch.stack([(states * head).sum(-1) for head in weight], 1)
