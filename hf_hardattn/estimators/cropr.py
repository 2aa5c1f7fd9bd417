"""Cropr: an auxiliary head learns which positions tell the class, and the top k of them stay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import ConditionalBernoulli
from ..functional.topk import topk_mask
from ..options import Weight
from . import Choice, Estimator, Sampling


class Cropr(Estimator):
    """Keep the top k, and teach the scores by an auxiliary head that predicts the class from what they weigh.

    ``loss = weight * CE(class, head(sum_n a_n V(x_n)))``, ``a_n = m_n / k`` with ``m_n = P(n in S)`` the exact marginals of the k-subset
    law that the scores define. The head reads all candidates, kept or dropped, so a position whose content tells the class draws weight
    without a gradient through the choice, and training computes on the kept positions only. The published method weighs by a softmax of
    the scores, which may rest on fewer than k positions and then ranks the others by chance; marginals weigh k of them.

    Scorer and head read detached states: the backbone hears the task loss only. The head is dropped after training: a saved model does
    not hold it, and a training that continues from a saved model starts with a fresh one.

    Args:
        weight: in [0, 1e6], of the head's loss in the training loss.

    Gradient and cost: nothing of the task loss; the head costs as a small layer over all candidates, the marginals O(N k). What a position
    tells alone is not what it is worth among the others: where only several positions together tell the class, choose at a later site.

    Raises:
        HardAttentionError: weight out of range; in training, a model that is not given one class for each example.

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
        """Choose the top k, with the loss of the auxiliary head where there is one."""
        law = ConditionalBernoulli(scores / sampling.temperature, k, valid, slots)
        marginals = law.marginals()
        choice = Choice(topk_mask(scores, k, valid, slots), entropy=-law.log_prob(marginals))
        if sampling.class_loss is not None:
            weights = marginals / marginals.sum(-1, keepdim=True).clamp(min=1)
            choice.penalty = torch.where(law.free, self.weight * sampling.class_loss(weights), 0.0)
        return choice
