"""Self-critical: the reward of the deterministic choice."""

from __future__ import annotations

from torch import Tensor

from ..errors import HardAttentionError
from . import Baseline


class SelfCritical(Baseline):
    """Return each example's reward under the deterministic top-k: a sample is reinforced if it beats the greedy choice.

    ``b_i = R(top-k of example i)``. It is independent of the sample, so it is unbiased. It costs a second forward pass. A greedy
    reward that is NaN or infinite is replaced by the mean of the finite ones in the batch.

    Source: Rennie et al. 2017, "Self-critical Sequence Training for Image Captioning", arXiv:1612.00563.
    """

    needs_greedy = True

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return ``greedy``, detached, fp32 ``[B]``.

        Raises:
            HardAttentionError: the greedy reward was not passed.
        """
        if greedy is None:
            raise HardAttentionError(
                "greedy=None at baseline self_critical; it compares with the reward of the deterministic selection. "
                "Pass that reward, or use baseline 'moving_average' or 'leave_one_out'."
            )
        greedy = greedy.detach()
        finite = greedy.isfinite()
        mean = greedy.where(finite, 0.0).sum() / finite.sum().clamp(min=1)
        return greedy.where(finite, mean)
