"""Leave-one-out: the mean reward of the other examples of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Baseline, sum_over_ranks


class LeaveOneOut(Baseline):
    """Return, for each example, the mean reward of the other examples of the batch, including other ranks.

    ``b_i = (sum_j R_j - R_i) / (B - 1)``. It excludes the example's own sample, so it is unbiased, and it has no state and nothing
    to tune. On a batch that consists of copies of one example it is RLOO. For a batch of one example it is 0. With gradient
    accumulation, the batch is the micro-batch, since later ones are not known yet. Rewards that are NaN or infinite are left out.

    Args:
        all_ranks: include the examples of other ranks. Every rank must then run the same forward passes.

    Source: Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", ICLR workshop;
    Mnih & Rezende 2016, arXiv:1602.06725.
    """

    def __init__(self, all_ranks: bool = True) -> None:
        super().__init__()
        self.all_ranks = all_ranks

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return the mean reward of the other examples, fp32 ``[B]``."""
        finite = reward.isfinite()
        own = reward.where(finite, 0.0)
        sums = torch.stack([own.sum(), finite.sum().to(own)])
        total, count = sum_over_ranks(sums) if self.all_ranks else sums
        return (total - own) / (count - finite.to(own)).clamp(min=1)
