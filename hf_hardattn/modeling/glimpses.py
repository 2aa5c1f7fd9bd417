"""Sequential selection: several glimpses of one row, and monotonic selection over the queries of a decoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..estimators import Choice, Estimator, Sampling
from ..scorers import Sequential


def look(
    scorer: Sequential,
    estimator: Estimator,
    features: Tensor,
    k: Tensor,
    candidates: Tensor,
    *,
    slots: int,
    sampling: Sampling | None,
    halts: bool,
    adaptive: bool = False,
) -> tuple[Choice, Tensor]:
    """Choose ``k`` positions in ``min(scorer.glimpses, slots)`` glimpses; the estimator makes the choice of each.

    The distribution of the whole choice is the product over the glimpses, so log-probabilities and entropies add up, and a score-function
    estimator stays unbiased. Gates of different glimpses are disjoint in the forward pass and add up too.

    Args:
        features: fp32 ``[B, H, N, F]``. k: int64 ``[B, H, 1]``. candidates: bool ``[B, H, 1, N]``. slots: static bound of ``k``.
        sampling: how to draw in training; None takes the best positions of each glimpse.
        adaptive: the gradient's temperature follows the spread of each glimpse's scores over the remaining candidates.
        halts: the scorer may stop before ``k``: in evaluation if the probability of continuing is below one half, in training by a draw.

    Returns:
        The choice, and fp32 scores ``[B, H, 1, N]``: those of the glimpse that kept a position, or of the last glimpse if none did. They
        are raised by a constant per glimpse, so that positions of earlier glimpses rank above those of later ones, and all of them above
        dropped positions.
    """
    # a row that has only its protected position has no slot; it makes one glimpse that chooses nothing
    looks = max(1, min(scorer.glimpses, slots))
    # a row with a smaller budget makes fewer glimpses, as it would alone: the rest of the batch has no influence
    turns = k.clamp(min=1, max=looks)  # [B, H, 1]
    state, remaining = scorer("start", features), candidates
    kept = torch.zeros_like(candidates)
    alive = torch.ones_like(k, dtype=features.dtype)  # [B, H, 1]: 1 until it stops; carries the stop's gradient
    reached = torch.ones_like(alive)  # probability of making this glimpse
    gates: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    penalty: Tensor | None = None
    made: list[tuple[Tensor, Tensor]] = []
    for turn in range(looks):
        if turn and halts:
            go_on = scorer("go_on", state)
            probability = go_on.sigmoid()
            if sampling is None:
                alive = alive * (go_on > 0)
            else:
                drawn = (sampling.uniform(tuple(go_on.shape)) < probability).to(go_on.dtype)
                if estimator.trains_gathered:
                    told = torch.where(drawn > 0, go_on, -go_on)
                    stop_log_prob = torch.nn.functional.logsigmoid(told) * alive
                    log_prob = stop_log_prob if log_prob is None else log_prob + stop_log_prob
                    alive = alive * drawn
                else:
                    alive = alive * (drawn + probability - probability.detach())
                reached = reached * probability
                fee = reached * (turn < turns) * (scorer.halting_cost or 0.0) / turns
                penalty = fee if penalty is None else penalty + fee
        count = (_ceil(k * (turn + 1), turns) - _ceil(k * turn, turns)).clamp(min=0) * (turn < turns)
        going = (alive.detach() > 0) & (turn < turns)
        scores = scorer("look", features, state)
        if adaptive and sampling is not None:
            wide = spread(scores.detach(), remaining).clamp(min=sampling.temperature)
            sampling = replace(sampling, backward_temperature=wide)
        choice = estimator.choose(scores, count * going, remaining, slots=-(-slots // looks), sampling=sampling)
        made.append((choice.mask, scores))
        kept = kept | choice.mask
        if choice.gates is not None:
            now = choice.gates * alive.unsqueeze(-1)
            gates = now if gates is None else gates + now
        if choice.log_prob is not None:
            log_prob = choice.log_prob if log_prob is None else log_prob + choice.log_prob
        if choice.entropy is not None:
            entropy = choice.entropy if entropy is None else entropy + choice.entropy
        if choice.penalty is not None:
            penalty = choice.penalty if penalty is None else penalty + choice.penalty
        seen = (choice.mask if choice.gates is None else choice.gates).to(features.dtype)
        seen = (seen @ features).squeeze(-2) / choice.mask.sum(-1).clamp(min=1)
        state = torch.where(going, scorer("see", state, seen), state)
        remaining = remaining & ~choice.mask
        if scorer.monotonic:
            remaining = remaining & _behind(choice.mask)
    # if everything is kept there is no choice, whatever the order of the glimpses
    chooses = (k < candidates.sum(-1)) | halts
    gates = None if gates is None else torch.where(chooses.unsqueeze(-1), gates, kept.to(gates.dtype))
    log_prob = None if log_prob is None else torch.where(chooses, log_prob, 0.0)
    entropy = None if entropy is None else torch.where(chooses, entropy, 0.0)
    if sampling is not None:
        # the last state decides nothing: give it a zero gradient, since distributed training waits for every parameter
        unread = 0.0 * (state.sum(-1, keepdim=True) + (scorer("go_on", state) if scorer.halts else 0.0))
        gates = None if gates is None else gates + unread.unsqueeze(-1)
        log_prob = None if log_prob is None else log_prob + unread
    return Choice(kept, gates, log_prob, entropy, penalty), _ranked(made, candidates)


def read_on(
    estimator: Estimator,
    scores: Tensor,
    k: Tensor,
    candidates: Tensor,
    passed: Tensor,
    *,
    slots: int,
    sampling: Sampling | None,
) -> Choice:
    """Choose for each query among the positions from the first one that the previous query kept.

    Args:
        scores: fp32 ``[B, H, Q, N]``. k: int64 ``[B, H, Q]``. candidates: bool ``[B, H, Q, N]``.
        passed: bool ``[B, H, N]``: positions that earlier decoding steps have passed.
    """
    made = []
    for query in range(scores.shape[2]):
        part = slice(query, query + 1)
        free = candidates[:, :, part] & ~passed.unsqueeze(2)
        drawn = None if sampling is None else _of_query(sampling, part)
        choice = estimator.choose(scores[:, :, part], k[:, :, part], free, slots=slots, sampling=drawn)
        passed = passed | before(choice.mask).squeeze(2)
        made.append(choice)
    return Choice(
        torch.cat([choice.mask for choice in made], 2),
        *(_joined([getattr(choice, name) for choice in made]) for name in ("gates", "log_prob", "entropy", "penalty")),
    )


def _of_query(sampling: Sampling, part: slice) -> Sampling:
    """Return how one query's choice is drawn: its rows of all settings that differ between queries, ``[B, H, Q, ...]``."""
    temperature, posterior = sampling.backward_temperature, sampling.posterior
    return replace(
        sampling,
        backward_temperature=temperature[:, :, part] if isinstance(temperature, Tensor) else temperature,
        posterior=None if posterior is None else posterior[:, :, part],
    )


def before(mask: Tensor) -> Tensor:
    """Return the positions before the first True one, bool ``[..., N]``; none if no position is True."""
    return (mask.cumsum(-1) == 0) & mask.any(-1, keepdim=True)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found, 2) if found else None


def _ceil(numerator: Tensor, denominator: Tensor) -> Tensor:
    return -(-numerator // denominator)


def _behind(mask: Tensor) -> Tensor:
    """Return the positions after the last True one, bool ``[..., N]``; all of them if no position is True."""
    n = mask.shape[-1]
    places = torch.arange(n, device=mask.device)
    return places > torch.where(mask, places, -1).amax(-1, keepdim=True)


def _ranked(made: list[tuple[Tensor, Tensor]], candidates: Tensor) -> Tensor:
    """Return the scores described in ``look``; the constants carry no gradient."""
    *_, (_, ranked) = made
    ranked = ranked.expand(candidates.shape)
    for mask, scores in reversed(made):
        known = ranked.detach()
        top = known.masked_fill(~candidates, float("-inf")).amax(-1, keepdim=True)
        low = scores.detach().masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
        lift = torch.where(mask.any(-1, keepdim=True), (top - low).clamp(min=0) + 1.0, 0.0)
        ranked = torch.where(mask, scores + lift, ranked)
    return ranked


def spread(scores: Tensor, free: Tensor) -> Tensor:
    """Return the standard deviation of each row's scores over its free positions, ``[..., 1]``."""
    count = free.sum(-1, keepdim=True).clamp(min=1)
    known = scores.masked_fill(~free, 0.0)
    variance = known.square().sum(-1, keepdim=True) / count - (known.sum(-1, keepdim=True) / count).square()
    return variance.clamp(min=0).sqrt()
