"""Cropr: an auxiliary head learns which positions predict the class, and the top k of them are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import ConditionalBernoulli
from ..functional.topk import topk_mask
from ..options import Weight
from . import Choice, Estimator, Sampling


class Cropr(Estimator):
    """Keep the top k, and train the scores by an auxiliary head that predicts the class from weighted states.

    ``loss = weight * CE(class, head(sum_n a_n V(x_n)))``, where ``a_n = m_n / k`` and ``m_n = P(n in S)`` are the exact marginals of
    the k-subset law that the scores define. The head reads all candidates, kept or dropped, so a position whose content predicts the
    class gains weight without a gradient through the choice, and training uses gathered execution. The published method weighs by a
    softmax of the scores, which may concentrate on fewer than k positions and then ranks the others by chance; the marginals weigh k.

    Scorer and head read detached states, so the backbone is trained by the task loss only. The head is dropped after training: a saved
    model does not contain it, and training that continues from a saved model starts with a new one.

    Args:
        weight: in [0, 1e6], weight of the head's loss in the training loss.

    Gradient and cost: the scores get no gradient from the task loss. The head costs as much as a small layer over all candidates, and
    the marginals O(N k). The head measures what a position predicts alone, not what it adds to the others: if only several positions
    together predict the class, choose at a later site.

    Raises:
        HardAttentionError: weight out of range; in training, a batch without one class for each example.

    Source: Bergner, Lippert & Mahendran 2024, "Token Cropr: Faster ViTs for Quite a Few Tasks", arXiv:2412.00965.
    """

    biased = True
    needs = ("class",)
    detaches = True
    source = "Bergner, Lippert & Mahendran 2024, arXiv:2412.00965"

    def __init__(self, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k; if there is an auxiliary head, its loss is the penalty."""
        law = ConditionalBernoulli(scores / sampling.temperature, k, valid, slots)
        marginals = law.marginals()
        choice = Choice(topk_mask(scores, k, valid, slots), entropy=-law.log_prob(marginals))
        if sampling.class_loss is not None:
            weights = marginals / marginals.sum(-1, keepdim=True).clamp(min=1)
            choice.penalty = torch.where(law.free, self.weight * sampling.class_loss(weights), 0.0)
        return choice
