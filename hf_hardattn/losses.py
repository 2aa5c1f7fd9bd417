"""The estimator's terms of the training loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .selection import Selection
from .selector import Selector


def auxiliary_loss(
    selections: Iterable[Selection],
    selectors: Mapping[str, Selector],
    reward: Tensor | None,
    greedy: Tensor | None = None,
) -> Tensor | None:
    """Sum the score-function surrogates and entropy bonuses of a forward pass.

    For each site with a log-probability: ``- weight * mean_b (reward_b - baseline_b) log p(selection_b)``, whose gradient is the
    REINFORCE gradient of the expected reward; minus ``entropy_weight * mean entropy``.

    Args:
        selections: of one forward pass.
        selectors: site name to selector.
        reward: fp32 ``[B]``, higher = better, of each example; or ``[]``, one for the whole batch (unbiased too, and noisier).
        greedy: the same for the deterministic choices; for baselines with ``needs_greedy``.

    Returns:
        fp32 scalar, or None when no site adds a term.

    Source: Williams (1992), equation 11; entropy bonus: Xu et al. (2015), equation 13.
    """
    terms = []
    for selection in selections:
        selector = selectors[selection.site]
        if selection.log_prob is not None and selector.baseline is not None and reward is not None:
            log_prob = selection.log_prob.sum((1, 2))
            baseline = selector.baseline(reward.view(-1), None if greedy is None else greedy.view(-1))
            advantage = (reward.view(-1) - baseline).detach()
            surrogate = -(advantage * log_prob)
            # one reward for the batch credits every example's choice; a reward of its own credits its own, averaged like the loss
            terms.append(
                selector.config.score_function_weight * (surrogate.sum() if reward.dim() == 0 else surrogate.mean())
            )
        weight = selector.entropy_weight(selector.step or 0)
        if weight and selection.entropy is not None:
            terms.append(-weight * selection.entropy.mean())
    return torch.stack(terms).sum() if terms else None
