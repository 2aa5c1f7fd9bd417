"""The estimator's terms of the training loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .modeling.selection import Selection
from .modeling.selector import Selector


def auxiliary_loss(
    selections: Iterable[Selection],
    selectors: Mapping[str, Selector],
    reward: Tensor | None,
    greedy: Tensor | None = None,
    others: Tensor | None = None,
) -> Tensor | None:
    """Sum what the sites of a forward pass add to the training loss.

    For each site with a log-probability: ``- weight * mean_b (reward_b - baseline_b) log p(selection_b)``, whose gradient is the
    REINFORCE gradient of the expected reward (times the baseline's ``scale``, where it whitens); minus ``entropy_weight * mean entropy``; plus the mean of an estimator's own
    penalty, and the error of a learned baseline.

    Args:
        selections: of one forward pass.
        selectors: site name to selector.
        reward: fp32 ``[B]``, higher = better, of each example; or ``[]``, one for the whole batch (unbiased too, and noisier).
        greedy: the same for the deterministic choices; for baselines with ``needs_greedy``.
        others: fp32 ``[K - 1, B]`` (or ``[K - 1]``): rewards of the step's other samples; their mean is then the baseline.

    Returns:
        fp32 scalar, or None when no site adds a term.

    Source: Williams (1992), equation 11; entropy bonus: Xu et al. (2015), equation 13; others: Kool et al. (2019).
    """
    terms = []
    for selection in (made.own for made in selections):
        selector = selectors[selection.site]
        if selection.penalty is not None:
            terms.append(selection.penalty.mean())
        weight = selector.now(selector.entropy_weight)
        if weight and selection.entropy is not None:
            terms.append(-weight * selection.entropy.mean())
        if selection.log_prob is None or reward is None:
            continue
        rewards, scale = reward.view(-1), None
        if others is not None:
            baseline = others.mean(0).view(-1)
        elif selector.baseline is not None:
            baseline = selector.baseline(rewards, None if greedy is None else greedy.view(-1), selection.summary)
            scale = selector.baseline.scale()
            lesson = selector.baseline.loss(baseline, rewards)
            if lesson is not None:
                terms.append(lesson)
        else:  # an estimator of several samples, given one: the other examples stand in for the other samples
            baseline = (rewards.sum() - rewards) / max(rewards.numel() - 1, 1)
        advantage = (rewards - baseline).detach()
        if scale is not None:
            advantage = advantage * scale.to(advantage)
        surrogate = -(advantage * selection.log_prob.sum((1, 2)))
        # one reward for the batch credits every example's choice; a reward of its own credits its own, averaged like the loss
        whole = surrogate.sum() if reward.dim() == 0 else surrogate.mean()
        terms.append(selector.config.score_function_weight * whole)
    return torch.stack(terms).sum() if terms else None
