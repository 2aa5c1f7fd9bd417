"""RLOO: several samples per step, each with the mean reward of the others as its baseline."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ..distributions import PlackettLuce
from ..options import Range
from . import Choice, Estimator, Sampling

_SAMPLES = Range(2, 1024, "Each sample needs another one for a baseline. For one sample use 'reinforce'.")


class Rloo(Estimator):
    """Draw ``samples`` ordered choices (Plackett-Luce) per step, one forward pass each, and score each against the rest.

    ``g = 1/K sum_i (R_i - mean_{j != i} R_j) grad log p(order_i)``: unbiased, without a state and with nothing to tune. The
    ``baseline`` of the configuration is not used. The loss is the mean over the samples, which also reduces the noise of the
    backbone's gradient.

    Args:
        samples: K in [2, 1024], forward passes per training step.

    Gradient and cost: K forward and backward passes, each gathered.

    Raises:
        HardAttentionError: fewer than 2 samples.

    Source: Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", ICLR workshop.
    """

    law = "plackett_luce"
    biased = False
    needs = ("reward", "passes")
    source = "Kool, van Hoof & Welling 2019, Buy 4 REINFORCE Samples, Get a Baseline for Free!"

    def __init__(self, samples: Annotated[int, _SAMPLES] = 4) -> None:
        super().__init__()
        self.passes = samples

    @property
    def samples(self) -> int:
        return self.passes

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions, with the log-probability of their order."""
        law = PlackettLuce(scores / sampling.temperature, k, valid, slots)
        mask, log_prob = law.explore(sampling.uniform, sampling.exploration)
        return Choice(mask, log_prob=log_prob, entropy=law.entropy())
