"""A sampled k-subset whose gates carry the gradient of ReinMax's second-order surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributions import ConditionalBernoulli
from . import Sampling


def second_order_gates(
    scores: Tensor, k: Tensor, valid: Tensor, slots: int, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a subset z, and give its gates the gradient ``(1/2 (z - m)(z - m)^T + C_tau - 1/2 C) v`` (see ``reinmax``).

    Args:
        scores, k, valid, slots, sampling: as in ``Estimator.choose``.

    Returns:
        bool mask and fp32 gates ``[..., N]``; fp32 entropy of the law ``[...]``.
    """
    law = ConditionalBernoulli(scores / sampling.temperature, k, valid, slots)
    mask = law.sample(sampling.uniform(tuple(scores.shape)))
    marginals = law.marginals()
    tau: float | Tensor = 1.0
    wide, wider = law, marginals
    if sampling.backward_temperature is not None:
        tau = torch.as_tensor(sampling.backward / sampling.temperature, device=scores.device).clamp(min=1.0)
        wide = ConditionalBernoulli(scores / (sampling.temperature * tau), k, valid, slots)
        wider = wide.marginals()
    # The gradient of the log-probability is z - m, so in the backward pass this product gives the outer product times v.
    log_prob = wide.log_prob(mask).unsqueeze(-1)
    outer = (mask.to(wider) - wider.detach()) * (log_prob - log_prob.detach())
    smooth = tau * (wider + 0.5 * outer) - 0.5 * marginals
    return mask, mask + (smooth - smooth.detach()), -law.log_prob(marginals)
