"""Perturbed: the derivative of top-k under Gaussian noise."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from ..distributions import SubsetLaw
from ..functional.topk import topk_mask
from ..options import Positive, Range
from . import Choice, Estimator, Sampling

_DRAWS = Range(2, 10**6, "A covariance needs at least 2 noise samples. The paper uses 500.")


class Perturbed(Estimator):
    """Keep the top k, and pass the derivative of the smoothed top-k ``y(s) = E topk(s + sigma T Z)``, Z standard normal.

    ``dy_i / ds_j = E[topk(s + sigma T Z)_i Z_j] / (sigma T)`` (Stein), so the gradient of a loss with ``v = dloss/dy`` is
    ``E[ <v, topk(s + sigma T Z)> Z ] / (sigma T)``. It is estimated by a sample covariance, which is centred and still unbiased:
    ``1 / (M - 1) sum_m <v, Y_m - mean Y> Z_m / (sigma T)``.

    Args:
        draws: M in [2, 10**6], draws of the noise per step.
        sigma: in [1e-6, 1e6], size of the noise at temperature 1. The paper's 0.05 is for scores scaled to [0, 1]; the default
            is for scores such as logits. If sigma is much smaller than the gaps between scores, there is no gradient.
        hard: True sets the gates to 0 and 1 in the forward pass, the unperturbed top k. False passes the mean of the perturbed
            top-k masks to the model, so that the gates in training differ from those in evaluation.

    Gradient and cost: unbiased for the smoothed loss if ``hard`` is False, up to the M draws; biased for the hard one.
    It computes M top-k over N positions and keeps 8 M N bytes per row for the backward pass, so keep M small if each query chooses.

    Raises:
        HardAttentionError: draws or sigma out of range.

    Source: Berthet et al. 2020, "Learning with Differentiable Perturbed Optimizers", arXiv:2002.08676, proposition 3.1;
    top-k: Cordonnier et al. 2021, "Differentiable Patch Selection", arXiv:2104.03059.
    """

    biased = True
    needs = ("gates",)
    caution = {
        "default": "on the planted rationale with 6% kept it stayed 2.8 ± 5.8 points below full attention "
        "(accuracy, 5 seeds, results/compare/defaults_text.md)."
    }
    source = "Berthet et al. 2020, arXiv:2002.08676; Cordonnier et al. 2021, arXiv:2104.03059"

    def __init__(self, draws: Annotated[int, _DRAWS] = 100, sigma: Positive = 1.0, hard: bool = True) -> None:
        super().__init__()
        self.draws, self.sigma, self.hard = draws, sigma, hard

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Choose the top k; the gates have the gradient of the smoothed top-k."""
        law = SubsetLaw(scores, k, valid, slots)
        sigma = self.sigma * (sampling.backward if self.hard else sampling.temperature)
        noise = torch.where(law.active, normal(sampling.uniform((self.draws, *scores.shape))), 0.0)
        found = topk_mask(law.scores.detach() + sigma * noise, law.k, law.valid, law.slots).float()
        smoothed, mask = found.mean(0), topk_mask(scores, k, valid, slots)
        # A term that is linear in the scores and has the value 0; its derivative is the sample covariance.
        along = (noise * ((law.scores - law.scores.detach()) / sigma)).sum(-1, keepdim=True)
        slope = ((found - smoothed) * along).sum(0) / (self.draws - 1)
        return Choice(mask, gates=(mask if self.hard else smoothed) + slope)


def normal(uniform: Tensor) -> Tensor:
    """Turn uniform noise in [0, 1] into standard normal noise, fp32, of absolute value at most 5.4."""
    eps = torch.finfo(torch.float32).eps / 2
    return math.sqrt(2) * torch.erfinv(2 * uniform.float().clamp(eps, 1 - eps) - 1)
