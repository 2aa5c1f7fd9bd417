"""Gumbel top-k: a sampled subset, and the gradient of its relaxation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import PlackettLuce, gumbel_noise
from ..functional.topk import topk_mask
from . import Choice, Estimator, Sampling
from ._relaxation import relax


class Gumbel(Estimator):
    """Keep the top k of the scores plus Gumbel noise, and pass the gradient of the relaxed k-hot vector.

    ``w = s + G``; the sample is top-k(w), an exact draw from Plackett-Luce(s). The relaxation runs k rounds of
    ``a = softmax(w / T)``, ``khot += a``, ``w += log(1 - a)``; it sums to k, and as T -> 0 it becomes the sample. At
    k = 1 it is the Gumbel-softmax.

    The temperature applies to the relaxation only, not to the law that is sampled. The entropy is that of the first pick.

    Args:
        hard: True sets the gates to 0 and 1 in the forward pass (straight-through). False passes the relaxed gates to the
            model, so that the gates in training differ from those in evaluation.

    Gradient and cost: biased towards the relaxation. It takes ``slots`` sequential rounds over N positions, and their memory, so
    it is slow for large k (unlike ``simple``).

    Source: Xie & Ermon 2019, "Reparameterizable Subset Sampling via Continuous Relaxations", arXiv:1901.10517;
    k = 1: Jang, Gu & Poole 2017, arXiv:1611.01144; Maddison, Mnih & Teh 2017, arXiv:1611.00712.
    """

    biased = True
    needs = ("gates",)
    source = "Xie & Ermon 2019, arXiv:1901.10517; k = 1: Jang et al. 2017, arXiv:1611.01144"

    def __init__(self, hard: bool = True) -> None:
        super().__init__()
        self.hard = hard

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions and their relaxation."""
        law = PlackettLuce(scores, k, valid, slots)
        noisy = law.scores + gumbel_noise(sampling.uniform(tuple(scores.shape)))
        mask = topk_mask(noisy.detach(), law.k, law.valid, law.slots)
        temperature = sampling.backward if self.hard else sampling.temperature
        relaxed = relax(noisy, torch.where(law.free, law.k, 0), law.active, temperature, law.slots)
        gates = relaxed + law.forced if not self.hard else mask + (relaxed - relaxed.detach())
        return Choice(mask, gates=gates, entropy=law.entropy())
