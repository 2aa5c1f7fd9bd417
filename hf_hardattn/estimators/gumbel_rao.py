"""Gumbel-Rao: one sampled subset, and the relaxation's gradient averaged over all noise that gives the same sample."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..laws import LOW, PlackettLuce
from ..options import Range
from . import Choice, Estimator, Sampling
from ._relaxation import relax


class GumbelRao(Estimator):
    """Keep the top k of the scores plus Gumbel noise, as ``gumbel`` does, with its gradient and less of its noise.

    Many noises give one sample. ``gumbel`` differentiates the relaxation at the one that was drawn; this takes the mean of
    the derivatives at ``draws`` others drawn given the order of the k picks: the same expected gradient, a lower variance.

    The noisy scores given the order ``i_1 ... i_k`` have a closed form. ``exp(-w_j)`` is the arrival time of an exponential
    clock of rate ``e^{s_j}``, and the waits between the first k arrivals do not depend on who arrives:
    ``exp(-w_{i_j}) = sum_{m <= j} E_m / R_m`` and, for the others, ``exp(-w_l) = exp(-w_{i_k}) + E_l / e^{s_l}``, with E
    standard exponential and ``R_m = sum of e^s not picked before m``. At k = 1 this is the paper's equation.

    The temperature is the relaxation's; the law that is sampled has none. The entropy is that of the first pick.

    Args:
        draws: M in [1, 10000], noises that share the sample. With 1 it is ``gumbel`` with other noise behind its gradient.

    Gradient and cost: biased, as ``gumbel`` is; M times its relaxation and its memory, O(M k N) numbers a row for the
    backward pass. Meant for k = 1 and small k.

    Raises:
        HardAttentionError: fewer than 1 draw.

    Source: Paulus, Maddison & Krause 2021, "Rao-Blackwellizing the Straight-Through Gumbel-Softmax Gradient Estimator",
    arXiv:2010.04838, section 3 (k = 1); the relaxation for k > 1: Xie & Ermon 2019, arXiv:1901.10517; given an order: the
    memoryless race of exponential clocks.
    """

    biased = True
    needs = ("gates",)
    source = "Paulus, Maddison & Krause 2021, arXiv:2010.04838; k > 1: given the order of the picks"

    def __init__(self, draws: Annotated[int, Range(1, 10_000, "It counts noises, >= 1.")] = 10) -> None:
        super().__init__()
        self.draws = draws

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions, and the mean relaxation of the draws that agree with them."""
        shape = tuple(scores.shape)
        law = PlackettLuce(scores, k, valid, slots)
        order = law.outcome(sampling.uniform(shape))
        noisy = conditional(law, order, sampling.uniform((self.draws, *shape)))
        # the derivative holds the noise fixed, so it passes from the scores to every draw as it is
        noisy = noisy + (law.scores - law.scores.detach())
        k_free, active = torch.where(law.free, law.k, 0), law.active.expand_as(noisy)
        relaxed = relax(noisy, k_free, active, sampling.backward, law.slots).mean(0)
        mask = law.mask_of(order)
        return Choice(mask, gates=mask + (relaxed - relaxed.detach()), entropy=law.entropy())


@torch.no_grad()
def conditional(law: PlackettLuce, order: Tensor, uniform: Tensor) -> Tensor:
    """Draw scores plus Gumbel noise, given that their largest are those of ``order``, in that order.

    Args:
        law: over rows ``[..., N]``.
        order: int64 ``[..., slots]`` from ``law.outcome``.
        uniform: fp32 ``[M, ..., N]`` in [0, 1].

    Returns:
        fp32 ``[M, ..., N]``; not a choice's where ``law.active`` is False, but finite.
    """
    limits = torch.finfo(torch.float32)
    waits = torch.log(-torch.log(uniform.float().clamp(limits.tiny, 1 - limits.eps / 2)))
    counts = (torch.arange(order.shape[-1], device=order.device) < law.k.unsqueeze(-1)) & law.free.unsqueeze(-1)
    scores = law.scores.masked_fill(~law.active, LOW)
    picked = scores.gather(-1, order).masked_fill(~counts, LOW)
    rest = scores.masked_fill(law.mask_of(order), LOW).logsumexp(-1, keepdim=True)
    rates = torch.cat([picked, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)[..., :-1]
    order = order.expand(*uniform.shape[:-1], -1)
    gaps = (waits.gather(-1, order) - rates).masked_fill(~counts, LOW)
    arrivals = gaps.logcumsumexp(-1)
    others = torch.logaddexp(arrivals[..., -1:], waits - law.scores)
    return -others.scatter(-1, order, torch.where(counts, arrivals, others.gather(-1, order)))
