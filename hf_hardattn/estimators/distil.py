"""Distil: the selector learns where the soft model attends."""

from __future__ import annotations

from torch import Tensor

from ..distributions import PlackettLuce
from ..functional.topk import topk_mask
from ..options import Weight
from . import Choice, Estimator, Sampling


class Distil(Estimator):
    """Keep the top k, and train the scores on the soft model's attention: ``KL(attention || softmax(scores))``.

    The attention comes from the same weights run with full attention. At ``self`` and ``cross`` sites it is that of the layer
    itself; at ``tokens`` and ``inputs`` sites it is the attention that each position receives in the layers that follow, as a mean
    over heads and queries. The scorer's input is detached, so the backbone is trained by the task loss only. Nothing is sampled: the
    ranking follows the soft weights and not the value of a position under the budget, so distil first and then train on with an
    estimator that uses the task loss.

    Args:
        weight: in [0, 1e6], weight of the divergence in the training loss.

    Raises:
        HardAttentionError: weight out of range.

    Gradient and cost: there is no gradient through the choice, so training uses gathered execution; one soft forward pass per step,
    without gradient.

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
