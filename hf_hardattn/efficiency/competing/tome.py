"""ToMe: merge the r most similar pairs of tokens in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import CompetingMethod, feed_forward, join, project


class ToMe(CompetingMethod):
    """Bipartite soft matching between attention and MLP; each token tracks how many tokens it represents.

    Tokens are assigned alternately to two sets. Each token of the first set is paired with the most similar token of the second, by the
    cosine of their keys (mean over heads); the r best pairs are replaced by their average, weighted by size s. Attention is
    proportional: ``softmax(q k / sqrt(d) + log s)``. CLS is never merged into another token.

    Args:
        r: pairs per layer, at most half of the tokens.

    Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", sections 3.1 to 3.3.
    """

    def __init__(self, model: Any, r: int):
        super().__init__(model)
        self.r = r

    def begin(self, hidden: Tensor) -> Tensor:
        self.size = hidden.new_ones(*hidden.shape[:2], 1)
        return hidden

    def layer(self, index: int, layer: Any, hidden: Tensor) -> Tensor:
        query, key, value = project(layer, hidden)
        bias = self.size.log().transpose(1, 2).unsqueeze(1) if index else None
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, bias)
        hidden = join(layer, hidden, mixed)
        hidden, self.size = merge(hidden, self.size, key.mean(1), self.r)
        return feed_forward(layer, hidden)


def merge(hidden: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge ``r`` pairs of ``hidden`` ``[B, N, D]``, whose tokens represent ``size`` ``[B, N, 1]`` tokens, by ``metric`` ``[B, N, d]``."""
    n, width = hidden.shape[1], hidden.shape[2]
    r = min(r, (n - 1) // 2)
    if r <= 0:
        return hidden, size
    metric = nn.functional.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -torch.inf  # CLS
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    gone, stay = order[:, :r, None], order[:, r:, None].sort(1).values
    target = partner.unsqueeze(-1).gather(1, gone)
    total = torch.cat((hidden * size, size), -1)
    first, second = total[:, ::2], total[:, 1::2]
    moved = first.gather(1, gone.expand(-1, -1, width + 1))
    second = second.scatter_add(1, target.expand(-1, -1, width + 1), moved)
    total = torch.cat((first.gather(1, stay.expand(-1, -1, width + 1)), second), 1)
    return total[..., :-1] / total[..., -1:], total[..., -1:]
