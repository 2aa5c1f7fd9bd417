"""Variational attention: train on the choice of an inference network that reads the labels."""

from __future__ import annotations

from torch import Tensor

from ..distributions import ConditionalBernoulli
from ..options import Weight
from . import Choice, Estimator, Sampling


class Variational(Estimator):
    """Draw from a posterior q(S | x, y), and pull the prior p(S | x) towards it: the evidence lower bound.

    ``loss = - log p(y | S) + weight KL(q || p)``, with S drawn from q. Both are conditional Bernoulli laws over k-subsets, so the
    divergence is exact: ``sum_i m_i (q_i - p_i) - log Z_q + log Z_p``, where m are the marginals of q. The gradient of the first
    term reaches q through the marginals, as in ``simple``. Evaluation takes the top k of the prior, as usual.

    Args:
        weight: in [0, 1e6], weight of the divergence.

    Raises:
        HardAttentionError: weight out of range.

    Gradient and cost: biased and exact only to first order, as ``simple``; twice its cost, plus a small inference network.

    Source: Deng et al. 2018, "Latent Alignment and Variational Attention", arXiv:1807.03756, section 4 (k = 1).
    """

    biased = True
    needs = ("gates", "target")
    source = "Deng et al. 2018, arXiv:1807.03756, section 4; k > 1: the conditional Bernoulli law"

    def __init__(self, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions from the posterior, or from the prior if there is no target (no labels were given)."""
        prior = ConditionalBernoulli(scores / sampling.temperature, k, valid, slots)
        posterior = prior
        if sampling.posterior is not None:
            posterior = ConditionalBernoulli(sampling.posterior / sampling.temperature, k, valid, slots)
        mask = posterior.sample(sampling.uniform(tuple(scores.shape)))
        marginals = posterior.marginals()
        # log_prob is linear in the mask, so its value at the marginals is its mean under the posterior.
        divergence = posterior.log_prob(marginals) - prior.log_prob(marginals)
        gates = mask + (marginals - marginals.detach())
        return Choice(mask, gates=gates, entropy=prior.entropy(), penalty=self.weight * divergence)
