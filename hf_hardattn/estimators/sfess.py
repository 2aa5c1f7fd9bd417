"""SFESS: a score function with the exact law of k-subsets, with several samples per step."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ..distributions import ConditionalBernoulli
from ..options import Range
from . import Choice, Estimator, Sampling

_SAMPLES = Range(
    2,
    1024,
    "Each sample needs another one for a baseline. For one sample use 'reinforce' with law='conditional_bernoulli'.",
)


class Sfess(Estimator):
    """Draw ``samples`` subsets per step from the conditional Bernoulli law, and score each against the rest.

    ``g = 1/K sum_i (R_i - mean_{j != i} R_j) grad log p(S_i)`` with ``p(S) ~ exp(sum of scores)``, the law that SIMPLE
    differentiates. Unbiased. A set carries less information than its order, so the gradient is less noisy than that of ``rloo`` at
    equal K.

    Args:
        samples: K in [2, 1024], forward passes per training step.

    Gradient and cost: K forward and backward passes, each gathered, and O(N k) for the law.

    Raises:
        HardAttentionError: fewer than 2 samples.

    Source: Wijk et al. 2025, "SFESS: Score Function Estimators for k-Subset Sampling", ICLR.
    """

    law = "conditional_bernoulli"
    biased = False
    needs = ("reward", "passes")
    source = "Wijk et al. 2025, SFESS, ICLR"

    def __init__(self, samples: Annotated[int, _SAMPLES] = 5) -> None:
        super().__init__()
        self.passes = samples

    @property
    def samples(self) -> int:
        return self.passes

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions, with the log-probability of the set."""
        law = ConditionalBernoulli(scores / sampling.temperature, k, valid, slots)
        mask, log_prob = law.explore(sampling.uniform, sampling.exploration)
        return Choice(mask, log_prob=log_prob, entropy=law.entropy())
