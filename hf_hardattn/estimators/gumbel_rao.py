"""Gumbel-Rao: one sampled subset, and the relaxation's gradient averaged over all noise that gives the same sample."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..distributions import PlackettLuce
from ..options import Range
from . import Choice, Estimator, Sampling
from ._relaxation import noisy_given_order, relax


class GumbelRao(Estimator):
    """Keep the top k of the scores plus Gumbel noise, as ``gumbel`` does, with its gradient and less of its noise.

    Many values of the noise give the same sample. ``gumbel`` differentiates the relaxation at the noise that was drawn. This
    estimator averages the derivatives over ``draws`` other values of the noise, drawn given the order of the k picks. The expected
    gradient is the same, and its variance is lower.

    The noisy scores given the order ``i_1 ... i_k`` have a closed form. ``exp(-w_j)`` is the arrival time of an exponential
    clock of rate ``e^{s_j}``, and the waiting times between the first k arrivals do not depend on which clocks arrive:
    ``exp(-w_{i_j}) = sum_{m <= j} E_m / R_m`` and, for the others, ``exp(-w_l) = exp(-w_{i_k}) + E_l / e^{s_l}``, with E
    standard exponential and ``R_m = sum of e^s not picked before m``. At k = 1 this is the equation of the paper.

    The temperature applies to the relaxation only, not to the law that is sampled. The entropy is that of the first pick.

    Args:
        draws: M in [1, 10000], values of the noise per sample. With 1 it is ``gumbel`` with other noise in its gradient.

    Gradient and cost: biased, as ``gumbel`` is. M times its relaxation and its memory: O(M k N) numbers per row for the
    backward pass. It is meant for k = 1 and small k.

    Raises:
        HardAttentionError: fewer than 1 draw.

    Source: Paulus, Maddison & Krause 2021, "Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator",
    arXiv:2010.04838, section 3 (k = 1); the relaxation for k > 1: Xie & Ermon 2019, arXiv:1901.10517; given an order: the
    memoryless race of exponential clocks.
    """

    biased = True
    needs = ("gates",)
    source = "Paulus, Maddison & Krause 2021, arXiv:2010.04838; k > 1: given the order of the picks"

    def __init__(
        self, draws: Annotated[int, Range(1, 10_000, "It is the number of noise samples, >= 1.")] = 10
    ) -> None:
        super().__init__()
        self.draws = draws

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions, and the mean relaxation of the draws that agree with them."""
        shape = tuple(scores.shape)
        law = PlackettLuce(scores, k, valid, slots)
        order = law.outcome(sampling.uniform(shape))
        noisy = noisy_given_order(law, order, sampling.uniform((self.draws, *shape)))
        # The derivative is taken at fixed noise, so every draw passes its gradient to the scores unchanged.
        noisy = noisy + (law.scores - law.scores.detach())
        k_free, active = torch.where(law.free, law.k, 0), law.active.expand_as(noisy)
        relaxed = relax(noisy, k_free, active, sampling.backward, law.slots).mean(0)
        mask = law.mask_of(order)
        return Choice(mask, gates=mask + (relaxed - relaxed.detach()), entropy=law.entropy())
