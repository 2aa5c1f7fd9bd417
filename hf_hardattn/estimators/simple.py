"""SIMPLE: an exact k-subset sample in the forward pass, the gradient of the exact marginals in the backward pass."""

from __future__ import annotations

from torch import Tensor

from ..distributions import ConditionalBernoulli
from ..functional.topk import topk_mask
from . import Choice, Estimator, Sampling


class Simple(Estimator):
    """Keep an exact sample of the k-subset law, and pass the gradient as if the gates were its marginals.

    ``p(S) ~ exp(sum_{i in S} s_i / T)``, ``m_i = P(i in S) = d log Z_k / d (s_i / T)``. In the forward pass ``gate = 1[i in S]``;
    in the backward pass ``d gate / d s = d m / d s``, the covariance of the law divided by T. The gradient is exact for a loss that
    is linear in the gates, and first-order otherwise. It takes one sample and no relaxation.

    Args:
        sample: True draws S (explores); False keeps the top k, with the same backward pass.

    Gradient and cost: O(N k) (see ``distributions.ConditionalBernoulli``).

    Source: Ahmed, Zeng, Niepert & Van den Broeck 2023, "SIMPLE: A Gradient Estimator for k-Subset Sampling",
    arXiv:2210.01941.
    """

    biased = True
    needs = ("gates",)
    source = "Ahmed, Zeng, Niepert & Van den Broeck 2023, arXiv:2210.01941"

    def __init__(self, sample: bool = True) -> None:
        super().__init__()
        self.stochastic = sample

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions (or take the top k); their gates have the gradient of the marginals."""
        same = sampling.backward_temperature is None
        if self.stochastic:
            law = ConditionalBernoulli((scores if same else scores.detach()) / sampling.temperature, k, valid, slots)
            mask = law.sample(sampling.uniform(tuple(scores.shape)))
        else:
            mask = topk_mask(scores, k, valid, slots)
        if not (self.stochastic and same):  # otherwise the law of the draw is also that of the gradient
            law = ConditionalBernoulli(scores / sampling.backward, k, valid, slots)
        marginals = law.marginals()
        return Choice(mask, gates=mask + (marginals - marginals.detach()), entropy=-law.log_prob(marginals))
