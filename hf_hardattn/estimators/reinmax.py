"""ReinMax: an exact k-subset sample in the forward pass, a second-order gradient in the backward pass."""

from __future__ import annotations

from torch import Tensor

from . import Choice, Estimator, Sampling
from ._second_order import second_order_gates


class Reinmax(Estimator):
    """Keep an exact sample z of the k-subset law, with a gradient that is exact for losses up to quadratic.

    Let m be the marginals and C the covariance of the law, v the gradient of the loss at z, and all scores be divided by T:

        ``g = 1/2 (C + (z - m)(z - m)^T) v``

    Derivation: ``grad E f = E_z E_y (z - m)(f(z) - f(y))`` with y a second sample, and Heun's rule
    ``f(z) - f(y) = 1/2 (grad f(z) + grad f(y))^T (z - y)`` is exact for quadratic f; the mean over y gives g. At
    k = 1 it is ReinMax itself, ``2 J(pi1) v - 1/2 J(p) v`` with ``pi1 = (p + z) / 2`` and J the Jacobian of the softmax. The
    derivation requires only that the law has a covariance, so it holds for k > 1 as well.

    If the temperature of the surrogate is ``tau`` times that of the law, m_tau and C_tau are those of the law at ``tau T``, and
    ``g = (1/2 (z - m_tau)(z - m_tau)^T + C_tau - 1/2 C) v``. This is ReinMax's own trade-off between bias and variance. tau >= 1: a
    backward temperature below that of the law is replaced by it.

    Gradient and cost: exact to second order, so biased for other losses. It is noisier than ``simple``, whose first-order gradient
    is ``C v``. O(N k), as ``simple``; twice that with a backward temperature.

    Source: Liu, Dong, Liu, Yu & Gao 2023, "Bridging Discrete and Backpropagation: Straight-Through and Beyond",
    arXiv:2304.08612 (k = 1); k > 1: derived here, with the law of Ahmed et al. 2023, arXiv:2210.01941.
    """

    biased = True
    needs = ("gates",)
    source = "Liu et al. 2023, arXiv:2304.08612 (k = 1); k > 1: Heun's rule for the conditional Bernoulli law"

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions; their gates have the gradient of the second-order surrogate."""
        mask, gates, entropy = second_order_gates(scores, k, valid, slots, sampling)
        return Choice(mask, gates=gates, entropy=entropy)
