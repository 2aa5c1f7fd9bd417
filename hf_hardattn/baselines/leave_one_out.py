"""Leave-one-out: the mean reward of the other examples of the batch."""

from __future__ import annotations

from torch import Tensor

from . import Base


class LeaveOneOut(Base):
    """Return, for each example, the mean reward of the other examples of this process's batch.

    ``b_i = (sum_j R_j - R_i) / (B - 1)``: without the example's own sample, so unbiased; no state, no tuning. With a
    batch made of copies of one example it is RLOO. A batch of one has no others: 0.

    Source: Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", ICLR workshop;
    Mnih & Rezende 2016, arXiv:1602.06725.
    """

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return the others' mean reward, fp32 ``[B]``."""
        return (reward.sum() - reward) / max(reward.numel() - 1, 1)
