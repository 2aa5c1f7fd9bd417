"""GRPO: several samples per step, each weighted by how far its reward lies from the mean of the group."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from ..distributions import ConditionalBernoulli, PlackettLuce
from ..options import Range
from . import Choice, Estimator, Sampling

_SAMPLES = Range(2, 1024, "A standard deviation needs at least 2 samples. For one sample use 'reinforce'.")
LAWS = {"plackett_luce": PlackettLuce, "conditional_bernoulli": ConditionalBernoulli}
FLOOR = 1e-4  # added to the deviation, so that rewards that differ only by rounding have no effect


class Grpo(Estimator):
    """Draw ``samples`` choices per step; weigh each by its reward in standard deviations of its group.

    ``A_i = (R_i - mean(R)) / (std(R) + 1e-4)`` over the K samples of an example (std with K in the denominator), and
    ``g = 1/K sum_i A_i grad log p(S_i)``. Every example has the same weight, whatever the scale of its rewards.

    This is GRPO with one optimizer step for each draw. The probability ratio of the new to the old policy is then always 1, so
    clipping would have no effect, and there is no option for it. Several optimizer steps on the same draws would require that a step
    replays the choices of the one before, which training does not do. There is no divergence from a reference policy either. What
    remains differs from ``rloo`` by the division: ``A_i = (K - 1) / K (R_i - mean of others) / std``.

    Args:
        samples: K >= 2, forward passes per training step. With 2, A is +1 and -1: only which of the two was better counts.
        law: ``plackett_luce`` (log-probability of the order drawn) or ``conditional_bernoulli`` (of the set; O(N k)).

    Gradient: fp32 ``[..., N]``. Biased: the deviation depends on the sample that is divided by it, so the expected gradient is not a
    multiple of the exact one. Examples whose K rewards are similar, both hard and easy ones, count as much as the others.
    Cost: K forward and backward passes, each gathered. The ``baseline`` of the configuration is not used.

    Raises:
        HardAttentionError: fewer than 2 samples; unknown law.

    Source: Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4.1.
    """

    biased = True
    needs = ("reward", "passes")
    source = "Shao et al. 2024, arXiv:2402.03300, section 4.1; one optimizer step per draw"

    def __init__(
        self,
        samples: Annotated[int, _SAMPLES] = 4,
        law: Literal["plackett_luce", "conditional_bernoulli"] = "plackett_luce",
    ) -> None:
        super().__init__()
        self.passes, self.law = samples, LAWS[law]

    @property
    def samples(self) -> int:
        return self.passes

    def advantage(self, reward: Tensor, others: Tensor) -> Tensor:
        """Return the distance of the reward from the mean of the group, in standard deviations of the group, fp32 ``[B]``."""
        group = torch.cat([reward.unsqueeze(0), others])
        return (reward - group.mean(0)) / (group.std(0, correction=0) + FLOOR)

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions, with their log-probability and the law's entropy."""
        law = self.law(scores / sampling.temperature, k, valid, slots)
        mask, log_prob = law.explore(sampling.uniform, sampling.exploration)
        return Choice(mask, log_prob=log_prob, entropy=law.entropy())
