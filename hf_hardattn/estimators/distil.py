"""Distil: the selector learns where the soft model attends."""

from __future__ import annotations

from torch import Tensor

from ..distributions import PlackettLuce
from ..functional.topk import topk_mask
from ..options import Weight
from . import Choice, Estimator, Sampling


class Distil(Estimator):
    """Keep the top k, and teach the scores the attention of the soft model: ``KL(attention || softmax(scores))``.

    The attention is that of the same weights run soft: at ``self`` and ``cross`` sites this layer's own, at ``tokens`` and
    ``inputs`` sites what each position receives in the layers that follow, a mean over heads and queries. The scorer's
    input is detached, so the backbone hears the task loss only. Nothing is sampled: ranks follow the soft weights, not what a
    position is worth under the budget, so distil first and let a task-loss estimator finish.

    Args:
        weight: in [0, 1e6], of the divergence in the training loss.

    Raises:
        HardAttentionError: weight out of range.

    Gradient and cost: no gradient through the choice, so it trains gathered; one soft forward pass a step without gradient.

    Source: DeepSeek-V3.2-Exp (2025), section 2.1, the dense warm-up of its indexer.
    """

    biased = True
    needs = ("teacher",)
    detaches = True
    caution = {
        "default": "on cluttered digits with 14% kept it stayed 4.6 ± 2.6 points below full attention "
        "(accuracy, 5 seeds, results/compare/defaults_digits.md); "
        "on cluttered Fashion-MNIST with 25% kept it stayed 4.5 ± 2.4 points below full attention "
        "(accuracy, 5 seeds, results/compare/defaults_fashion.md); "
        "on the planted rationale with 6% kept it stayed 45.8 ± 43.4 points below full attention, 1 of 5 runs failed "
        "(accuracy, 5 seeds, results/compare/defaults_text.md)."
    }
    source = "DeepSeek-V3.2-Exp 2025, section 2.1"

    def __init__(self, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k; the model's hook adds the divergence."""
        law = PlackettLuce(scores / sampling.temperature, k, valid, slots)
        return Choice(topk_mask(scores, k, valid, slots), entropy=law.entropy())
