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

    ``p = argmax <s / T, p> + H_alpha(p)`` over ``0 <= p <= 1, sum p = k``, where H_alpha is Tsallis' entropy. The solution is
    ``p_i = clip((alpha - 1) s_i / T - c, 0, 1)^{1 / (alpha - 1)}``, with c such that the sum is k. Its derivative is
    ``dp/ds = (diag(w) - w w^T / sum w) / T``, with ``w = p^{2 - alpha}`` if 0 < p < 1, else 0. alpha = 2 is ``sparsemax``, and
    alpha -> 1 is the softmax (capped). At k = 1 it equals the function of the entmax package, whose functions sum to 1 or have
    alpha = 2. With k above 1 the cap is needed, since a single position could otherwise get more than 1.

    Args:
        alpha: in [1.001, 2]; larger = sparser.
        hard: True sets the gates to the top k, 0 and 1, in the forward pass, with this gradient (straight-through). False passes p
            to the model: there is no noise and no bias for its own smooth objective, but the gates in training differ from those in
            evaluation.

    Gradient and cost: the gradient is nonzero only where 0 < p < 1. Positions far below or far above the k-th score learn nothing,
    so start with small scores or a high temperature. The cost is that of about two sorts: a top-k and 26 bisections over N.

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
        """Choose the top k; the gates have the gradient of the sparse map, or are the sparse map."""
        law = SubsetLaw(scores, k, valid, slots)
        mask = topk_mask(scores, k, valid, slots)
        temperature = sampling.backward if self.hard else sampling.temperature
        logits = law.scores / temperature
        p = _capped(logits.detach(), law, self.alpha)
        weight = torch.where((p > 0) & (p < 1), p ** (2 - self.alpha), 0.0)
        # A term whose value is 0 and whose derivative is that of p.
        moved = weight * (logits - logits.detach())
        slope = moved - weight * moved.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        return Choice(mask, gates=(mask if self.hard else p + law.forced) + slope)


def _capped(logits: Tensor, law: SubsetLaw, alpha: float) -> Tensor:
    """Return p, fp32 ``[..., N]``, summing to k in rows with a choice; 0 elsewhere."""
    masked = logits.masked_fill(~law.active, LOW)
    last = masked.topk(law.slots, dim=-1).values.gather(-1, (law.k - 1).clamp(min=0).unsqueeze(-1))
    # Scores relative to the k-th one: c then lies in [-1, 0], and differences above 1 do not matter, so large scores stay exact.
    x = ((alpha - 1) * (masked - last)).clamp(-1, 1)
    low, k = torch.full_like(last, -1.0), law.k.unsqueeze(-1)
    for step in range(1, STEPS + 1):
        middle = low + 0.5**step
        low = torch.where((x - middle).clamp(0, 1).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= k, middle, low)
    return torch.where(law.active, (x - low).clamp(0, 1).pow(1 / (alpha - 1)), 0.0)
