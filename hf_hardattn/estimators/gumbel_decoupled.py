"""Decoupled Gumbel: one temperature for the sample, another for the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import PlackettLuce, gumbel_noise
from ..functional.topk import topk_mask
from . import Choice, Estimator, Sampling
from ._relaxation import relax


class GumbelDecoupled(Estimator):
    """Sample k positions at one temperature, and pass the gradient of a relaxation at another, with the same noise.

    ``z = topk(s / T_f + G)`` is an exact draw from Plackett-Luce(``s / T_f``). The gradient is that of the relaxed k-hot
    vector of ``w = s / T_b + G``: k rounds of ``a = softmax(w)``, ``khot += a``, ``w += log(1 - a)``. At k = 1 it is
    ``J(softmax(s / T_b + G)) / T_b``.

    ``T_f`` is the ``temperature`` of the configuration and sets the amount of exploration. ``T_b`` is its ``backward_temperature``
    and sets over how many positions the gradient spreads. Without a ``backward_temperature`` the two are equal.

    In ``gumbel``, by contrast, the noise is divided by the temperature too (``softmax((s + G) / T)``), so the temperature
    changes only the relaxation and not the law that is sampled. At temperatures of 1 both estimators are the same.

    Gradient: shape and dtype of the scores, fp32 ``[..., N]``; it sums to 0 over a row. Biased. Cost: as for ``gumbel``, ``slots``
    rounds over N positions. The entropy is that of the first pick.

    Source: Shah, Yan, Mozer & Liu 2024, "Improving Discrete Optimisation Via Decoupled Straight-Through Gumbel-Softmax",
    arXiv:2410.13331 version 1 (k = 1); k > 1: the rounds of Xie & Ermon 2019, arXiv:1901.10517.
    """

    biased = True
    needs = ("gates",)
    source = "Shah, Yan, Mozer & Liu 2024, arXiv:2410.13331v1; k > 1: Xie & Ermon 2019, arXiv:1901.10517"

    def sample(self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling) -> Choice:
        """Draw k positions at the forward temperature, with their relaxation at the backward temperature."""
        law = PlackettLuce(scores / sampling.temperature, k, valid, slots)
        noise = gumbel_noise(sampling.uniform(tuple(scores.shape)))
        mask = topk_mask((law.scores + noise).detach(), law.k, law.valid, law.slots)
        k_free = torch.where(law.free, law.k, 0)
        relaxed = relax(scores / sampling.backward + noise, k_free, law.active, 1.0, law.slots)
        return Choice(mask, gates=mask + (relaxed - relaxed.detach()), entropy=law.entropy())
