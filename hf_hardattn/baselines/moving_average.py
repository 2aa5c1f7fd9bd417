"""Moving average: the mean reward of earlier batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..options import Range
from . import Baseline, sum_over_ranks

_MOMENTUM = Range(0, 1, "It is the share of the old average; the usual value is 0.9.", open_high=True)


class MovingAverage(Baseline):
    """Return the exponential moving average of the batch-mean reward, as it stood BEFORE this batch.

    ``b_t = a_{t-1}``, with ``a_1 = mean_1`` and ``a_t = momentum a_{t-1} + (1 - momentum) mean_t``. The rewards of a batch
    never enter its own baseline, so the gradient is unbiased; in exchange, the baseline of the first batch is 0.
    Only training batches update the average. Under ``HardAttentionCallback``, ``Driver`` and the training scripts, a batch is that of an
    optimizer step: the mean is taken over the examples of all ranks and micro-batches. In other training loops, each rank has an average
    of its own examples, since a forward pass does not wait for other ranks.

    Rewards that are NaN or infinite are left out, since mixed-precision training skips the step they belong to. If the average is
    nevertheless not finite, for example because it comes from an older checkpoint, it counts as not yet known.

    Args:
        momentum: in [0, 1); 0 uses the mean of the previous batch.
        whiten: divide ``reward - baseline`` by the standard deviation of earlier rewards, averaged in the same way. The size
            of the gradient then does not depend on the unit of the reward.

    Attributes:
        value, variance: fp32 scalars, or None before the first training batch: the average of the rewards, and the average squared
            distance of the rewards from it. They are not in the state dict, because they describe the run and not the model.

    Raises:
        HardAttentionError: momentum out of range.

    Source: Williams 1992 (reinforcement comparison); Xu et al. 2015, "Show, Attend and Tell",
    arXiv:1502.03044, section 4.1 (momentum 0.9); dividing by the deviation: Mnih & Gregor 2014, arXiv:1402.0030, section 2.3.2.
    """

    run_state: ClassVar[tuple[str, ...]] = ("value", "variance")

    def __init__(self, momentum: Annotated[float, _MOMENTUM] = 0.9, whiten: bool = False) -> None:
        super().__init__()
        self.momentum, self.whiten = momentum, whiten
        self.value: Tensor | None = None
        self.variance: Tensor | None = None
        # Of this rank's examples since the last update: their number, the mean reward, and the sum of squared distances from it.
        self._seen: Tensor | None = None

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return the average before this batch, fp32 ``[B]``, the same for every example; in training, update it afterwards."""
        before = reward.new_zeros(()) if self.value is None else _or_else(self.value.to(reward), 0.0)
        if self.training:
            seen = _moments(reward.detach())
            self._seen = seen if self._seen is None else _together(self._seen, seen)
            if not self.deferred:
                self._learn(lambda sums: sums)
        return before.expand(reward.shape)

    def update(self) -> None:
        """Update the average with the rewards of all ranks since the last update."""
        self._learn(sum_over_ranks)

    @torch.no_grad()
    def _learn(self, total_of: Callable[[Tensor], Tensor]) -> None:
        if self._seen is None:
            return
        (count, mean, distance), self._seen = self._seen, None
        total, rewards = total_of(torch.stack([count, count * mean]))
        middle = rewards / total  # NaN when no reward was finite
        spread = total_of(distance + count * (mean - _or_else(middle, 0.0)).square()) / total
        value = middle if self.value is None else _or_else(self.value.to(middle), middle)
        variance = spread if self.variance is None else _or_else(self.variance.to(spread), spread)
        # Equal to what averages of the reward and of its square give, but without the difference of two large numbers.
        moved = self.momentum * (1 - self.momentum) * (value - middle).square()
        self.variance = _or_else(torch.lerp(spread, variance, self.momentum) + moved, variance)
        self.value = _or_else(torch.lerp(middle, value, self.momentum), value)

    def scale(self) -> Tensor | None:
        """Return 1 / (standard deviation of earlier rewards); None before the first batch, or without ``whiten``."""
        if not self.whiten or self.variance is None:
            return None
        return _or_else(self.variance, 1.0).clamp(min=1e-8).rsqrt()


def _moments(rewards: Tensor) -> Tensor:
    """Return the number of finite rewards, their mean, and the sum of squared distances from it, fp32 ``[3]``."""
    finite = rewards.isfinite()
    count = finite.sum().to(rewards)
    mean = rewards.where(finite, 0.0).sum() / count.clamp(min=1)
    return torch.stack([count, mean, (rewards - mean).square().where(finite, 0.0).sum()])


def _or_else(values: Tensor, fallback: Tensor | float) -> Tensor:
    """Return ``values`` where they are finite and ``fallback`` elsewhere, without a device synchronisation."""
    return values.where(values.isfinite(), fallback)


def _together(a: Tensor, b: Tensor) -> Tensor:
    """Merge two results of ``_moments``. Subtracting the squared mean from the sum of squares would lose most of the digits.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    count, gap = (a[0] + b[0]).clamp(min=1), b[1] - a[1]
    return torch.stack([a[0] + b[0], a[1] + gap * b[0] / count, a[2] + b[2] + gap.square() * a[0] * b[0] / count])
