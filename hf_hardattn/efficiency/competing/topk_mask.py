"""Per-query top-k attention by a mask, as in most implementations of hard attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import CompetingMethod, feed_forward, join, project


class TopKMask(CompetingMethod):
    """Every query of every layer and head attends to the keys of its k largest logits; the others are set to minus infinity. This saves
    no computation.

    Args:
        keep: share of the keys to keep.

    Source: Gupta et al. 2021, "Memory-efficient Transformers via Top-k Attention", equation 2.
    """

    def __init__(self, model: Any, keep: float):
        super().__init__(model)
        self.keep = keep

    def layer(self, index: int, layer: Any, hidden: Tensor) -> Tensor:
        query, key, value = project(layer, hidden)
        logits = query @ key.transpose(-1, -2) * layer.attention.scaling
        last = logits.topk(max(1, round(self.keep * logits.shape[-1])), -1).values[..., -1:]
        weights = logits.masked_fill(logits < last, -torch.inf).softmax(-1)
        return feed_forward(layer, join(layer, hidden, weights @ value))

    def nominal_share(self, n: int) -> float:
        return max(1, round(self.keep * n)) / n
