"""Hard concrete: every position has an independent gate, and a Lagrange multiplier sets the rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..distributions import LOW, SubsetLaw
from ..options import Positive, Weight
from . import Choice, Estimator, Sampling


class HardConcrete(Estimator):
    """Give every position its own gate in [0, 1], with mass at both ends, and learn how many to keep.

    ``z = clip(1.2 sigmoid((s / T + L) / temper) - 0.1, 0, 1)`` with logistic noise L, so that
    ``P(z > 0) = sigmoid(s / T + temper log 11)`` in closed form. The mean of these probabilities over a row is its rate. The mean
    rate over the batch is driven to the budget: the penalty of a row is ``(multiplier + stiffness * gap) * (rate - k / valid)``,
    where gap is the mean of ``rate - k / valid`` over the batch. The multiplier ascends this penalty while all other parameters
    descend it: its gradient is reversed, so one optimizer does both. It needs no weight decay, and it settles sooner with a
    larger learning rate.

    In training, a row may keep any number of positions (at least one), so hard and easy examples may differ. Evaluation takes the
    top k of the budget. To let each row keep its own number there too, evaluate with the budget ``"threshold:0.5"``, which keeps
    ``sigmoid(s) > 0.5``, where the median gate is above one half. (Train with a ratio: under a threshold, the target would be the rate
    of the row itself.)

    Args:
        temper: in [1e-6, 1e6], temperature of the gates; lower = more of them at 0 and 1.
        stiffness: in [0, 1e6], strength of the penalty at the start, before the multiplier has grown.

    Attributes:
        multiplier: parameter ``[1]``, starts at 0.

    Gradient and cost: exact for the relaxed gates, biased for hard ones; O(N). A gate that is at 0 or 1 for nearly all noise gets
    a gradient neither from the task nor from the rate, so start with small scores.

    Raises:
        HardAttentionError: temper not positive; stiffness negative.

    Source: Louizos, Welling & Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization", arXiv:1712.01312,
    equations 10-12; Lagrangian to a target: Bastings, Aziz & Titov 2019, arXiv:1905.08160.
    """

    biased = True
    needs = ("gates",)
    exact_budget = False
    caution = {
        "default": "on cluttered Fashion-MNIST with 25% kept it stayed 2.0 ± 0.7 points below full attention "
        "(accuracy, 5 seeds, results/compare/defaults_fashion.md); "
        "on the planted rationale with 6% kept it stayed 4.1 ± 5.3 points below full attention "
        "(accuracy, 5 seeds, results/compare/defaults_text.md)."
    }
    source = "Louizos, Welling & Kingma 2018, arXiv:1712.01312; target: Bastings et al. 2019, arXiv:1905.08160"

    def __init__(self, temper: Positive = 2 / 3, stiffness: Weight = 10.0) -> None:
        super().__init__()
        self.temper, self.stiffness = temper, stiffness
        self.multiplier = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Set the multiplier to 0."""
        nn.init.zeros_(self.multiplier)

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw a gate for every position, and compute the penalty that drives the rate to ``k / valid``."""
        law = SubsetLaw(scores, k, valid, slots)
        logits = law.scores / sampling.temperature
        eps = torch.finfo(torch.float32).eps / 2
        stretched = 1.2 * ((logits + sampling.uniform(tuple(scores.shape)).logit(eps)) / self.temper).sigmoid() - 0.1
        gates = torch.where(law.active, stretched.clamp(0, 1), 0.0)
        # A row that would drop everything keeps its likeliest position, which evaluation would keep first.
        leads = torch.zeros_like(law.active).scatter(
            -1, logits.masked_fill(~law.active, LOW).argmax(-1, keepdim=True), True
        )
        lone = leads & law.active & (gates <= 0).all(-1, keepdim=True)
        gates = torch.where(lone, 1 + (stretched - stretched.detach()), gates) + law.forced
        on = torch.where(law.active, (logits + self.temper * math.log(11)).sigmoid(), 0.0)
        return Choice(gates > 0, gates=gates, penalty=self._penalty(law, on.sum(-1)))

    def _penalty(self, law: SubsetLaw, expected: Tensor) -> Tensor:
        """Return the Lagrangian term of each row, fp32 ``[...]``; ``expected``: expected number of gates that are not 0."""
        count = law.active.sum(-1).clamp(min=1)
        gap = torch.where(law.free, (expected - law.k) / count, 0.0)
        mean = gap.detach().sum() / law.free.sum().clamp(min=1)
        climbing = 2 * self.multiplier.detach() - self.multiplier  # the same value, with the gradient reversed
        return (climbing + self.stiffness * mean) * gap
