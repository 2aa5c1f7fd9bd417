"""EViT: keep the patches that CLS attends to, and fuse the others into one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import CompetingMethod, feed_forward, join, project


class EViT(CompetingMethod):
    """After the attention of one layer, keep the share ``keep`` of patches with the largest attention from CLS (mean over heads). The
    other patches are fused into one token, their sum weighted by that attention.

    Args:
        keep: share of the patches to keep. after: layer, counted from 0.

    Source: Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", section 3.
    """

    def __init__(self, model: Any, keep: float, after: int = 0):
        super().__init__(model)
        self.keep, self.after = keep, after

    def layer(self, index: int, layer: Any, hidden: Tensor) -> Tensor:
        query, key, value = project(layer, hidden)
        if index != self.after:
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
            return feed_forward(layer, join(layer, hidden, mixed))
        weights = (query @ key.transpose(-1, -2) * layer.attention.scaling).softmax(-1)
        hidden = join(layer, hidden, weights @ value)
        paid = weights[:, :, 0, 1:].mean(1)
        k = max(1, -(-int(1000 * self.keep) * paid.shape[1] // 1000))
        order = paid.argsort(-1, descending=True).unsqueeze(-1)
        patches = hidden[:, 1:].gather(1, order.expand(-1, -1, hidden.shape[-1]))
        fused = (paid.unsqueeze(-1).gather(1, order)[:, k:] * patches[:, k:]).sum(1, keepdim=True)
        return feed_forward(layer, torch.cat((hidden[:, :1], patches[:, :k], fused), 1))
