"""ReinMax-Rao: ReinMax with its midpoint term replaced by a Gumbel-Rao estimate."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..distributions import LOW, ConditionalBernoulli, PlackettLuce
from ..options import Range
from . import Choice, Estimator, Sampling
from ._relaxation import noisy_given_order, relax
from ._second_order import second_order_gates


class ReinmaxRao(Estimator):
    """Keep an exact sample z, with ReinMax's gradient in which the first term is a Gumbel-Rao estimate.

    With p the softmax of ``theta = s / T``, ``pi = (p + z) / 2`` and ``J(q) = diag(q) - q q^T``, ReinMax is
    ``g = 2 J(pi) v - 1/2 J(p) v``. This estimator replaces the first Jacobian:

        ``g = 2/M sum_m J(y_m) v / tau - 1/2 J(p) v``,  ``y_m = softmax((log pi + G_m) / tau)``

    where the M Gumbel noise vectors ``G_m`` are drawn given that ``log pi + G_m`` is largest at the position of z.

    The method is defined for one kept position. Rows that keep more than one use the gradient of ``reinmax``.

    Args:
        draws: M >= 1, noise vectors per sample. The paper uses 32.
        tau: > 0, temperature of the relaxation relative to that of the law; a configured ``backward_temperature`` replaces it
            (as ``backward_temperature / temperature``). Lower = less bias towards the relaxation, more variance.

    Gradient: fp32 ``[..., N]``; it sums to 0 over a row. Biased, also for linear losses, for which ReinMax is exact: given
    that z is largest, ``y_m`` lies near z more often than ``log pi`` implies, so the estimate is too small on average. On the toy
    problems with exact gradients (``scripts/research/estimator_table.py``), its variance is slightly below that of ReinMax and the error
    of a single step above it; ``simple`` has less of both. The gains reported in the paper are in training discrete VAEs.

    Cost: one forward pass; for rows that keep one position, M softmaxes over N positions and their memory.

    Raises:
        HardAttentionError: fewer than 1 draw; tau not positive.

    Source: Wang & Bui 2026, "Beyond ReinMax: Low-Variance Gradient Estimators for Discrete Latent Variables",
    arXiv:2603.08257, equation 17 (printed with ``J(pi)`` in the second term; its derivation, and ReinMax, have ``J(p)``).
    """

    biased = True
    needs = ("gates",)
    source = "Wang & Bui 2026, arXiv:2603.08257 (k = 1); k > 1: as reinmax"

    def __init__(
        self,
        draws: Annotated[int, Range(1, 10_000, "It is the number of noise samples, >= 1.")] = 32,
        tau: Annotated[float, Range(1e-6, 1e6, "A temperature is > 0.")] = 0.7,
    ) -> None:
        super().__init__()
        self.draws, self.tau = draws, tau

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions; rows of one position get the Rao-Blackwellised surrogate, the others ReinMax's."""
        mask, second_order, entropy = second_order_gates(scores, k, valid, slots, sampling)
        # With one slot the law is the softmax over the valid positions, whatever k is.
        law = ConditionalBernoulli(scores / sampling.temperature, k, valid, 1)
        smooth = 2 * self._relaxed(law, mask, sampling) - 0.5 * law.marginals()
        gates = mask + (smooth - smooth.detach())
        single = (law.free & (mask.sum(-1) == 1)).unsqueeze(-1)
        return Choice(mask, gates=torch.where(single, gates, second_order), entropy=entropy)

    def _relaxed(self, law: ConditionalBernoulli, mask: Tensor, sampling: Sampling) -> Tensor:
        """Return the mean of the relaxed one-hot vectors at the midpoint of law and draw, fp32 ``[..., N]``."""
        midpoint = torch.where(law.active, (law.marginals().detach() + mask) / 2, 0.0)
        log_midpoint = midpoint.clamp(min=torch.finfo(midpoint.dtype).tiny).log()
        noise_law = PlackettLuce(log_midpoint.masked_fill(~law.active, LOW), law.k, law.valid, 1)
        order = mask.long().argmax(-1, keepdim=True)
        noisy = noisy_given_order(noise_law, order, sampling.uniform((self.draws, *mask.shape)))
        # The noise is held fixed, and the logits of the midpoint get the derivative of the scores.
        noisy = noisy + (law.scores - law.scores.detach())
        tau = self.tau if sampling.backward_temperature is None else sampling.backward / sampling.temperature
        k_free = torch.where(noise_law.free, noise_law.k, 0)
        return relax(noisy, k_free, noise_law.active.expand_as(noisy), tau, 1).mean(0)
