"""Self-critical: the reward of the deterministic choice."""

from __future__ import annotations

from torch import Tensor

from ..errors import HardAttentionError
from . import Baseline


class SelfCritical(Baseline):
    """Return each example's reward under the deterministic top-k: a sample is reinforced if it beats the greedy choice.

    ``b_i = R(top-k of example i)``: independent of the sample, so unbiased; per example; costs a second forward pass. Where the
    greedy reward is NaN or infinite, the mean of the batch's finite ones stands in for it.

    Source: Rennie et al. 2017, "Self-critical Sequence Training for Image Captioning", arXiv:1612.00563.
    """

    needs_greedy = True

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return ``greedy``, detached, fp32 ``[B]``.

        Raises:
            HardAttentionError: the greedy reward was not handed over.
        """
        if greedy is None:
            raise HardAttentionError(
                "greedy=None at baseline self_critical; it compares with the reward of the deterministic choice. "
                "Hand over that reward, or take baseline 'moving_average' or 'leave_one_out'."
            )
        greedy = greedy.detach()
        finite = greedy.isfinite()
        mean = greedy.where(finite, 0.0).sum() / finite.sum().clamp(min=1)
        return greedy.where(finite, mean)
