"""Straight-through: a hard top-k in the forward pass, the gradient of a smooth surrogate in the backward pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..functional.topk import topk_mask
from . import Choice, Estimator, Sampling

SURROGATES = ("balanced", "softmax", "sigmoid", "identity")
UNBALANCED = (
    "its gradient does not sum to 0 over a row, so the scores of dropped positions can rise together. On cluttered digits with 8% kept it reached {}, "
    "random selection 19.3 ± 1.7, 'balanced' 87.9 ± 1.0 (accuracy in %, 5 seeds, results/compare/surrogates.md)."
)


class StraightThrough(Estimator):
    """Keep the top k, and pass the gradient as if the gates were a smooth function of the scores.

    In the forward pass ``gate_i = 1[i in top-k]``. In the backward pass ``d gate / d s`` is that of the surrogate, with the
    (backward) temperature T:

    * ``balanced``: ``sigmoid((s_i - c) / T)``, where c moves with the scores so that the sum of the gates stays k. The slope is
      taken with c half-way between the k-th and the (k+1)-th score, where it is steepest:
      ``(diag(w) - w w^T / sum w) / T``, where w are the slopes of the sigmoid.
    * ``softmax``: ``k softmax(s / T)_i``, which sums to k as the mask does; it is large only near the highest score.
    * ``sigmoid``: as ``balanced``, but with a constant c.
    * ``identity``: ``s_i``, as first published; it has no temperature.

    The gradients of ``balanced`` and ``softmax`` sum to 0 over a row: when the score of one position rises, others fall. Those of
    ``sigmoid`` and ``identity`` do not: if the gradient of the loss is negative on average over the dropped positions, all their
    scores rise, whatever the positions contain (see ``caution``).

    Args:
        surrogate: ``balanced``, ``softmax``, ``sigmoid`` or ``identity``.

    Gradient: fp32 ``[..., N]``. Biased. Nothing is sampled, so there is no variance, but no exploration either. Rows without a
    choice (k = 0, k >= valid count) have zero gradient. Cost: O(N).

    In configurations of schema version 1, the default surrogate was ``sigmoid`` (see ``former_defaults``).

    Raises:
        HardAttentionError: unknown surrogate.

    Source: Bengio, Leonard & Courville 2013, arXiv:1308.3432 (``identity``, and the sigmoid's slope).
    """

    biased = True
    needs = ("gates",)
    source = "Bengio, Leonard & Courville 2013, arXiv:1308.3432"
    caution = {
        "surrogate=sigmoid": UNBALANCED.format("24.3 ± 19.3"),
        "surrogate=identity": UNBALANCED.format("20.1 ± 11.4"),
    }
    former_defaults = {1: {"surrogate": "sigmoid"}}

    def __init__(self, surrogate: Literal["balanced", "softmax", "sigmoid", "identity"] = "balanced") -> None:
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
                # The derivative of c subtracts from each position its share of the total change.
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
    """Return the mean of the lowest kept and the highest dropped score, ``[..., 1]``; finite even if one is missing."""
    limits = torch.finfo(scores.dtype)
    lowest = scores.masked_fill(~mask, limits.max).amin(-1, keepdim=True)
    highest = scores.masked_fill(~dropped, limits.min).amax(-1, keepdim=True)
    return lowest / 2 + highest / 2
