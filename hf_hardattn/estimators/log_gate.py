"""Log gate: a continuous gate inside the softmax over the kept positions; the choice itself has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import LOW, SubsetLaw
from ..functional.topk import topk_mask
from . import Choice, Estimator, Sampling


class LogGate(Estimator):
    """Keep the top k as a fixed choice, and weigh the attention among the kept positions by their scores.

    ``g = k softmax(s / T over the kept)``. A gate multiplies ``exp(logit)``, so ``log g`` is added to the logits, and the task
    loss reaches the scores as it reaches the logits. Dropped positions get no gradient. They can be kept again only because all
    scores share the weights of the scorer; add exploration, or warm up with ``distil``.

    Args:
        hard: True sets the gates to 1 in the forward pass, with the derivative of ``log g``, so that training and evaluation use the
            same gates. False passes g, which sums to k, to the model. This is the method as published, but evaluation has no gates.

    Gradient and cost: there is no gradient if a row keeps one position (g is 1 whatever its score), so use k > 1. O(N).

    Source: Tencent 2026, "Simple Attention Sparsification" (SAS), arXiv:2609.13141.
    """

    biased = True
    needs = ("gates",)
    caution = {
        "default": "on the planted rationale with 6% kept it stayed 96.7 ± 1.1 points below full attention, 5 of 5 runs failed "
        "(accuracy, 5 seeds, results/compare/defaults_text.md)."
    }
    source = "SAS 2026, arXiv:2609.13141"

    def __init__(self, hard: bool = True) -> None:
        super().__init__()
        self.hard = hard

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k, with gates that distribute k over the kept positions."""
        law = SubsetLaw(scores, k, valid, slots)
        mask = topk_mask(scores, k, valid, slots)
        kept = mask & law.active
        logits = law.scores / (sampling.backward if self.hard else sampling.temperature)
        log_gate = logits.masked_fill(~kept, LOW).log_softmax(-1)
        if self.hard:
            value = torch.where(kept, log_gate, 0.0)
            return Choice(mask, gates=mask + (value - value.detach()))
        return Choice(mask, gates=torch.where(kept, law.k.unsqueeze(-1) * log_gate.exp(), 0.0) + law.forced)
