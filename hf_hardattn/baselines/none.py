"""No baseline: zero."""

from __future__ import annotations

from torch import Tensor

from . import Baseline


class NoBaseline(Baseline):
    """Return 0: plain REINFORCE. The noise of its gradient is 10 to 20 times the gradient, so use it for comparisons only.

    Source: Williams 1992, REINFORCE, with b = 0.
    """

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return zeros, fp32 ``[B]``."""
        return reward.new_zeros(reward.shape)
