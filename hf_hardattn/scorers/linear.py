"""One linear map of the position's state."""

from __future__ import annotations

from collections.abc import Iterator

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
        if not torch.is_grad_enabled():
            # few operations: a GPU waits for each
            states = nn.functional.rms_norm(states, (self.hidden_size,))
            return self._per_head([_dot(states, w) + b for w, b in self._heads()])
        # RMSNorm's factor on the scores, not on the states: training would keep what is normalised, a tensor of their size
        scores = torch.stack([_dot(states, w) for w in self.weight.float()], 1)
        square = torch.linalg.vector_norm(states, dim=-1).square() / self.hidden_size
        scale = (square + torch.finfo(square.dtype).eps).rsqrt()
        return (scores * scale.unsqueeze(1) + self.bias.float()[:, None]).unsqueeze(-1)

    def _heads(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.weight.float(), self.bias.float(), strict=True)

    @staticmethod
    def _per_head(scores: list[Tensor]) -> Tensor:
        return (torch.stack(scores, 1) if len(scores) > 1 else scores[0].unsqueeze(1)).unsqueeze(-1)


def _dot(states: Tensor, weight: Tensor) -> Tensor:
    # row by row, not as a matrix product: equal tokens then score equal to the last bit in any batch, with and without a cache
    return (states * weight).sum(-1)
