"""Entmax: the sparse alternative to softmax, for k positions."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..distributions import LOW, SubsetLaw
from ..functional.topk import topk_mask
from ..options import Range
from . import Choice, Estimator, Sampling

STEPS = 26  # bisections of an interval of length 1: below fp32 rounding
_ALPHA = Range(1.001, 2, "1.5 is usual, 2 is sparsemax, and near 1 it is the softmax.")


class Entmax(Estimator):
    """Spread k over the positions by alpha-entmax, no position above 1: deterministic, and 0 for most.

    ``p = argmax <s / T, p> + H_alpha(p)`` over ``0 <= p <= 1, sum p = k``, H_alpha Tsallis' entropy:
    ``p_i = clip((alpha - 1) s_i / T - c, 0, 1)^{1 / (alpha - 1)}``, c from the sum. ``dp/ds = (diag(w) - w w^T / sum w) / T``,
    ``w = p^{2 - alpha}`` where 0 < p < 1, else 0. alpha = 2 is ``sparsemax``; alpha -> 1 the softmax (capped). At k = 1 it is
    the entmax package's, whose functions sum to 1 or have alpha = 2; k above 1 needs the cap, or one position would hold several.

    Args:
        alpha: in [1.001, 2]; larger = sparser.
        hard: True keeps the gates at 0 and 1 in the forward, the top k, with this gradient (straight-through); False gives p
            to the model: no noise, no bias for its own smooth objective, but it sees in training what it does not see in
            evaluation.

    Gradient and cost: only where 0 < p < 1: positions far below the k-th score, and far above, learn nothing, so start with
    small scores or a high temperature. Two sorts' worth: a top-k and 26 bisections over N.

    Raises:
        HardAttentionError: alpha out of range.

    Source: Peters, Niculae & Martins 2019, "Sparse Sequence-to-Sequence Models", arXiv:1905.05702; the cap:
    Blondel 2019, "Structured Prediction with Projection Oracles", arXiv:1910.11369.
    """

    biased = True
    needs = ("gates",)
    caution = {
        "default": "on the planted rationale with 6% kept it stayed 2.9 ± 6.4 points below full attention "
        "(accuracy, 5 seeds, results/compare/defaults_text.md)."
    }
    source = "Peters, Niculae & Martins 2019, arXiv:1905.05702; k > 1: its mean over the k-subset polytope"

    def __init__(self, alpha: Annotated[float, _ALPHA] = 1.5, hard: bool = True) -> None:
        super().__init__()
        self.alpha, self.hard = alpha, hard

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k, with the sparse map behind (or as) the gates."""
        law = SubsetLaw(scores, k, valid, slots)
        mask = topk_mask(scores, k, valid, slots)
        temperature = sampling.backward if self.hard else sampling.temperature
        logits = law.scores / temperature
        p = _capped(logits.detach(), law, self.alpha)
        weight = torch.where((p > 0) & (p < 1), p ** (2 - self.alpha), 0.0)
        # p's own derivative on a term whose value is 0
        moved = weight * (logits - logits.detach())
        slope = moved - weight * moved.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        return Choice(mask, gates=(mask if self.hard else p + law.forced) + slope)


def _capped(logits: Tensor, law: SubsetLaw, alpha: float) -> Tensor:
    """Return p, fp32 ``[..., N]``, summing to k in rows with a choice; 0 elsewhere."""
    masked = logits.masked_fill(~law.active, LOW)
    last = masked.topk(law.slots, dim=-1).values.gather(-1, (law.k - 1).clamp(min=0).unsqueeze(-1))
    # from the k-th score, so that c lies in [-1, 0], and what is 1 beyond does not matter: exact, however large the scores
    x = ((alpha - 1) * (masked - last)).clamp(-1, 1)
    low, k = torch.full_like(last, -1.0), law.k.unsqueeze(-1)
    for step in range(1, STEPS + 1):
        middle = low + 0.5**step
        low = torch.where((x - middle).clamp(0, 1).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= k, middle, low)
    return torch.where(law.active, (x - low).clamp(0, 1).pow(1 / (alpha - 1)), 0.0)
