"""Moving average: the mean reward of earlier batches."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from ..errors import HardAttentionError
from . import Base


class MovingAverage(Base):
    """Return the exponential moving average of the batch-mean reward, as it stood BEFORE this batch.

    ``b_t = a_{t-1}``, with ``a_1 = mean_1`` and ``a_t = momentum a_{t-1} + (1 - momentum) mean_t``. A batch's rewards
    never enter its own baseline, so the gradient is unbiased; the price is that the first batch has 0 for a baseline.
    Only training batches move the average. Across ranks the mean is over the examples of all of them.

    Args:
        momentum: in [0, 1); 0 takes the previous batch's mean.

    Attributes:
        value: fp32 scalar, or None before the first training batch. Not in the state dict: it describes the run, not
            the model.

    Raises:
        HardAttentionError: momentum out of range.

    Source: Williams 1992 (reinforcement comparison); Xu et al. 2015, "Show, Attend and Tell",
    arXiv:1502.03044, section 4.1 (momentum 0.9).
    """

    value: Tensor | None

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise HardAttentionError(
                f"momentum={momentum!r} is out of range at baseline moving_average; "
                "it is the share of the old average, in [0, 1). The usual value is 0.9."
            )
        self.momentum = momentum
        # None, not zeros: from_pretrained fills buffers that no checkpoint holds with whatever the memory held
        self.register_buffer("value", None, persistent=False)

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return the average before this batch, fp32 ``[B]``, the same for every example; in training, then move it."""
        before = reward.new_zeros(()) if self.value is None else self.value.to(reward)
        if self.training:
            mean = _mean_over_ranks(reward.detach())
            self.value = mean if self.value is None else torch.lerp(mean, before, self.momentum)
        return before.expand(reward.shape)


@torch.no_grad()
def _mean_over_ranks(reward: Tensor) -> Tensor:
    """Mean over the examples of all ranks, a scalar; ranks may hold different numbers of examples."""
    total = torch.stack([reward.sum(), torch.full_like(reward.sum(), reward.numel())])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total[0] / total[1]
