"""Sparsemax: the nearest point of the k-subset polytope."""

from __future__ import annotations

from torch import Tensor

from ..distributions import LOW, SubsetLaw
from ..errors import missing_extra
from ..functional.topk import topk_mask
from . import Choice, Estimator, Sampling


class Sparsemax(Estimator):
    """Project the scores onto ``{p: 0 <= p <= 1, sum p = k}``: deterministic, 0 or 1 for most positions.

    ``p = argmin |p - s / T|^2 = clip(s / T - c, 0, 1)``, with c such that the sum is k; ``dp/ds = (diag(a) - a a^T / sum a) / T``,
    where a = 1 if 0 < p < 1, else 0.

    Args:
        hard: True sets the gates to the top k, 0 and 1, in the forward pass, with this gradient (straight-through). False passes p
            to the model: there is no noise and no bias for its own smooth objective, but the gates in training differ from those in
            evaluation.

    Gradient and cost: the gradient is nonzero only where 0 < p < 1. Scores further than T from the border learn nothing (``entmax``
    reaches further), so start with small scores or a high temperature. It runs a top-k and 30 bisections over N. ``torch.compile``
    breaks the graph at the function of the package (but not in ``entmax`` with ``alpha=2``, which is the same map).

    Raises:
        ImportError: the package ``entmax`` is not installed.

    Source: Martins & Astudillo 2016, "From Softmax to Sparsemax", arXiv:1602.02068; with a budget: Malaviya, Ferreira &
    Martins 2018, arXiv:1805.08241 (the package's ``budget_bisect``).
    """

    biased = True
    needs = ("gates",)
    caution = {
        "default": "on the planted rationale with 6% kept it stayed 3.3 ± 6.1 points below full attention "
        "(accuracy, 5 seeds, results/compare/defaults_text.md)."
    }
    source = "Martins & Astudillo 2016, arXiv:1602.02068; budget: Malaviya et al. 2018, arXiv:1805.08241"

    def __init__(self, hard: bool = True) -> None:
        super().__init__()
        try:
            from entmax import budget_bisect
        except ImportError as error:
            raise missing_extra("entmax", "entmax", "estimator sparsemax") from error
        self.project, self.hard = budget_bisect, hard

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k; the gates have the gradient of the projection, or are the projection."""
        law = SubsetLaw(scores, k, valid, slots)
        mask = topk_mask(scores, k, valid, slots)
        logits = law.scores / (sampling.backward if self.hard else sampling.temperature)
        masked = logits.masked_fill(~law.active, LOW)
        last = masked.detach().topk(law.slots, dim=-1).values.gather(-1, (law.k - 1).clamp(min=0).unsqueeze(-1))
        # Relative to the k-th score, c lies in [-1, 0]: the size of a score beyond +-2 does not matter, and the bisection is exact.
        near = (masked - last).clamp(-2, 2)
        budget = law.k.where(law.free, 1).clamp(min=1).to(near)
        # All rows in one dimension: the package's backward pass mixes up rows if a dimension before the last has size 1.
        p = self.project(near.reshape(-1, near.shape[-1]), budget.reshape(-1, 1), n_iter=30).view(near.shape)
        p = p.where(law.active, 0.0)
        return Choice(mask, gates=mask + (p - p.detach()) if self.hard else p + law.forced)
