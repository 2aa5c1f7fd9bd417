"""Terms that selectors add to the training loss: score-function surrogate, entropy bonus, penalties of estimators and baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import HardAttentionError
from ..modeling.selection import Selection
from ..modeling.selector import Selector


def auxiliary_loss(
    selections: Iterable[Selection],
    selectors: Mapping[str, Selector],
    reward: Tensor | None,
    greedy: Tensor | None = None,
    others: Tensor | None = None,
) -> Tensor | None:
    """Compute the auxiliary loss of one forward pass, summed over its sites.

    A site can contribute four terms:

    * the score-function surrogate ``- score_function_weight * mean_b A_b log p(selection_b)``, whose gradient is the REINFORCE
      gradient of the expected reward. The advantage ``A_b`` is ``reward_b - baseline_b``, times the baseline's ``scale`` if it
      whitens rewards; with several samples a step it is the estimator's ``advantage``;
    * the loss of a baseline that is learned;
    * ``- entropy_weight * mean entropy``;
    * the mean penalty of estimators that have one (``variational``, ``hard_concrete``).

    Models with hard attention add this loss to ``outputs.loss`` in training mode. Call it yourself only if your training loop
    computes the loss outside the model.

    Args:
        selections: recorded in the forward pass.
        selectors: site name to selector, as returned by ``hf_hardattn.selectors(model)``.
        reward: fp32 ``[B]``, one reward per example, higher = better; or ``[]``, one reward for the batch (also unbiased, with more
            variance). None adds no score-function term.
        greedy: reward of the deterministic selections, shaped like ``reward``; only read by baselines with ``needs_greedy``.
        others: fp32 ``[K - 1, B]`` (or ``[K - 1]``), rewards of the step's other samples. If given, they replace the baseline.

    Returns:
        fp32 scalar with gradient, or None if no site has a term.

    Raises:
        HardAttentionError: there are more or fewer rewards than rows.

    Source: Williams 1992, equation 11 (surrogate); Xu et al. 2015, arXiv:1502.03044, equation 13 (entropy bonus); Kool, van Hoof &
    Welling 2019 (baseline from the other samples).
    """
    terms: list[Tensor] = []
    for recorded in selections:
        selection, selector = recorded.own, selectors[recorded.site]
        terms += _regularisation(selection, selector)
        terms += _score_function(selection, selector, reward, greedy, others)
    return torch.stack(terms).sum() if terms else None


def _regularisation(selection: Selection, selector: Selector) -> list[Tensor]:
    """Return the terms that need no reward: the estimator's penalty and the entropy bonus, fp32 scalars."""
    terms = []
    if selection.penalty is not None:
        terms.append(selection.penalty.mean())
    weight = selector.now(selector.entropy_weight)
    if weight and selection.entropy is not None:
        terms.append(-weight * selection.entropy.mean())
    return terms


def _score_function(
    selection: Selection, selector: Selector, reward: Tensor | None, greedy: Tensor | None, others: Tensor | None
) -> list[Tensor]:
    """Return the surrogate of a sampled selection, and the loss of its baseline if that is learned, fp32 scalars."""
    if selection.log_prob is None or reward is None:
        return []
    rewards, terms = reward.view(-1), []
    if reward.dim() and len(rewards) != len(selection.log_prob):
        raise HardAttentionError(
            f"{len(rewards)} rewards were given for {len(selection.log_prob)} rows at '{selection.site}'; there must be one reward per "
            "example, [B], or one for the batch, []. Return a reward of each row of the batch, or use estimator 'simple', which needs none."
        )
    if others is not None:
        advantage = selector.estimator.advantage(rewards, others.view(len(others), -1))
    elif selector.baseline is not None:
        baseline = selector.baseline(rewards, None if greedy is None else greedy.view(-1), selection.summary)
        baseline_loss = selector.baseline.loss(baseline, rewards)
        if baseline_loss is not None:
            terms.append(baseline_loss)
        scale = selector.baseline.scale()
        advantage = rewards - baseline if scale is None else (rewards - baseline) * scale.to(rewards)
    else:
        # An estimator of several samples was given a single one: the other examples stand in for the other samples.
        advantage = selector.estimator.advantage(rewards, _other_examples(rewards))
    surrogate = -(advantage.detach() * selection.log_prob.sum((1, 2)))
    # One reward for the whole batch credits every example's selection, so their log-probabilities add up. A reward per example
    # credits its own selection and is averaged, as the loss is.
    total = surrogate.sum() if reward.dim() == 0 else surrogate.mean()
    return [*terms, selector.config.score_function_weight * total]


def _other_examples(rewards: Tensor) -> Tensor:
    """Return, for each of the B examples, the rewards of all others: fp32 ``[B - 1, B]``."""
    count = len(rewards)
    shifts = torch.arange(1, count, device=rewards.device).unsqueeze(-1)
    return rewards[(torch.arange(count, device=rewards.device) + shifts) % count]
