"""ReinMax: an exact k-subset sample forward, a second-order gradient backward."""

from __future__ import annotations

from torch import Tensor

from . import Choice, Estimator, Sampling
from ._second_order import second_order_gates


class Reinmax(Estimator):
    """Keep an exact sample z of the k-subset law, with a gradient that is exact for losses up to quadratic.

    With m the marginals and C the covariance of the law, v the loss's gradient at z, all scores over T:

        ``g = 1/2 (C + (z - m)(z - m)^T) v``

    Why: ``grad E f = E_z E_y (z - m)(f(z) - f(y))`` with y a second sample, and Heun's rule
    ``f(z) - f(y) = 1/2 (grad f(z) + grad f(y))^T (z - y)`` is exact for quadratic f; taking the mean over y leaves g. At
    k = 1 it is ReinMax itself, ``2 J(pi1) v - 1/2 J(p) v`` with ``pi1 = (p + z) / 2`` and J the softmax's Jacobian; the
    derivation asks for no more than a law with a covariance, so for k > 1 it holds as well.

    With the surrogate's temperature at ``tau`` times the law's, m and C of the law at ``tau T``:
    ``g = (1/2 (z - m_tau)(z - m_tau)^T + C_tau - 1/2 C) v``, ReinMax's own trade of bias for variance. tau >= 1: a lower
    backward temperature counts as the law's.

    Gradient and cost: exact to second order, so biased for other losses; noisier than ``simple``, whose first-order gradient
    is ``C v``. O(N k), as ``simple``; twice with a backward temperature.

    Source: Liu, Dong, Liu, Yu & Gao 2023, "Bridging Discrete and Backpropagation: Straight-Through and Beyond",
    arXiv:2304.08612 (k = 1); k > 1: derived here, with the law of Ahmed et al. 2023, arXiv:2210.01941.
    """

    biased = True
    needs = ("gates",)
    source = "Liu et al. 2023, arXiv:2304.08612 (k = 1); k > 1: Heun's rule for the conditional Bernoulli law"

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions, with the second-order surrogate behind their gates."""
        mask, gates, entropy = second_order_gates(scores, k, valid, slots, sampling)
        return Choice(mask, gates=gates, entropy=entropy)
