"""Straight-through: hard top-k forward, the gradient of a smooth stand-in backward."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..selection import topk_mask
from . import Choice, Estimator, Sampling


class StraightThrough(Estimator):
    """Keep the top k, and pass the gradient as if the gates were a smooth function of the scores.

    Forward ``gate_i = 1[i in top-k]``; backward ``d gate / d s`` is that of the surrogate:

    * ``sigmoid``: ``sigmoid((s_i - c) / T)``, c half-way between the k-th and the (k+1)-th score, a constant: steepest
      where the choice is closest.
    * ``balanced``: the same with a c that moves with the scores so that the gates' sum stays k:
      ``(diag(w) - w w^T / sum w) / T``, w the sigmoid's slopes. What one position gains others lose.
    * ``softmax``: ``k softmax(s / T)_i``, which sums to k as the mask does.
    * ``identity``: ``s_i`` (Bengio et al.'s original); has no temperature.

    Nothing is sampled, so nothing is explored. Rows without a choice (k = 0, k >= valid count) have zero gradient.

    Args:
        surrogate: ``sigmoid``, ``balanced``, ``softmax`` or ``identity``.

    Raises:
        HardAttentionError: unknown surrogate.

    Source: Bengio, Leonard & Courville 2013, arXiv:1308.3432.
    """

    biased = True
    needs = ("gates",)
    source = "Bengio, Leonard & Courville 2013, arXiv:1308.3432"

    def __init__(self, surrogate: Literal["sigmoid", "balanced", "softmax", "identity"] = "sigmoid") -> None:
        super().__init__()
        self.surrogate = surrogate

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k; nothing is sampled."""
        mask = topk_mask(scores, k, valid, slots)
        dropped = valid & ~mask
        active = valid & (mask.any(-1, keepdim=True) & dropped.any(-1, keepdim=True))
        if self.surrogate in ("sigmoid", "balanced"):
            smooth = torch.sigmoid((scores - _midpoint(scores.detach(), mask, dropped)) / sampling.backward)
            if self.surrogate == "balanced":
                weight = torch.where(active, (smooth * (1 - smooth)).detach(), 0.0)
                moved = torch.where(active, smooth - smooth.detach(), 0.0).sum(-1, keepdim=True)
                smooth = smooth - weight * moved / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        elif self.surrogate == "softmax":
            logits = (scores / sampling.backward).masked_fill(~active, torch.finfo(scores.dtype).min)
            smooth = mask.sum(-1, keepdim=True) * logits.softmax(-1)
        else:
            smooth = scores
        smooth = torch.where(active, smooth, 0.0)
        return Choice(mask, gates=mask + (smooth - smooth.detach()))


def _midpoint(scores: Tensor, mask: Tensor, dropped: Tensor) -> Tensor:
    """Return half-way between the lowest kept and the highest dropped score, ``[..., 1]``; finite where one lacks."""
    limits = torch.finfo(scores.dtype)
    lowest = scores.masked_fill(~mask, limits.max).amin(-1, keepdim=True)
    highest = scores.masked_fill(~dropped, limits.min).amax(-1, keepdim=True)
    return lowest / 2 + highest / 2
