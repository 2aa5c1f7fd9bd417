"""The choice of one site: from scores to a selection."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..distributions.noise import uniform
from ..errors import HardAttentionError
from ..estimators import Choice, Sampling
from ..functional.topk import level_ties
from .candidates import Candidates, Masks, TrainingInputs
from .context import Settings
from .glimpses import look, read_on, spread
from .offloading import weights_in_place
from .ranking import best_of_ragged_rows, count_slots
from .selection import Selection

if TYPE_CHECKING:
    from .selector import Selector


def choose(
    selector: Selector,
    scores: Tensor,
    features: Tensor,
    candidates: Candidates,
    settings: Settings,
    inputs: TrainingInputs | None,
) -> Selection:
    """Choose among ``candidates`` by ``scores`` ``[B, H, Q, N]``.

    Args:
        features: ``[B, H, N, F]``, for scorers that take several glimpses.
        settings: settings of this call. inputs: further inputs of a choice in training.
    """
    if _keeps_the_best(selector, settings):
        if _is_plain(selector, candidates):
            return _best_indices(selector, scores, candidates)
        return best_of_ragged_rows(selector, scores, candidates)
    masks = candidates.masks(scores)
    scores = scores.expand(masks.valid.shape)
    if settings.forced is not None:
        return _replayed(selector, scores, masks, settings)
    return _chosen_mask(selector, scores, features, candidates, masks, settings, inputs)


def _keeps_the_best(selector: Selector, settings: Settings) -> bool:
    """Return whether every row keeps its best candidates and nothing is drawn, so that sorting gives the indices without a mask."""
    return selector.sorts and not settings.drawing and settings.forced is None and not selector.runs_masked(settings)


def _is_plain(selector: Selector, candidates: Candidates) -> bool:
    """Return whether every row keeps K of N candidates, known from the shapes alone."""
    return candidates.valid is None and candidates.protected is None and not selector.data_dependent


def _best_indices(selector: Selector, scores: Tensor, candidates: Candidates) -> Selection:
    first, last = candidates.ends.first, int(candidates.ends.last)
    n = scores.shape[-1]
    slots = selector.final_budget.slots(n - first - last) + first + last
    ranked = scores
    if first or last:
        # protected rows rank above all others, so that one sort places them too
        ranked = nn.functional.pad(scores[..., first : n - last], (first, last), value=torch.inf)
    # stable: of equal scores, the lower index is kept
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    return Selection(
        selector.site,
        None,
        None,
        None,
        scores,
        slots=slots,
        dense=True,
        indices=best.sort(dim=-1).values,
        candidates=candidates,
    )


def _replayed(selector: Selector, scores: Tensor, masks: Masks, settings: Settings) -> Selection:
    """Return the selection that the caller gave, restricted to the present candidates."""
    forced: Tensor = settings.forced  # type: ignore[assignment]
    shape = scores.shape
    if any(given not in (1, size) for given, size in zip(forced.shape, shape, strict=True)):
        raise HardAttentionError(
            f"the selection to replay at '{selector.site}' has the shape {list(forced.shape)}; that of this call has {list(shape)}. Replay a "
            "recording on the batch it was made on, under the same hf_hardattn.execution: masked sites drop no rows."
        )
    mask = forced.expand(shape) & masks.valid
    mask = mask if masks.protected is None else mask | masks.protected
    masked = selector.runs_masked(settings)
    slots, full, lengths = count_slots(selector, mask, masked)
    return Selection(
        selector.site,
        mask,
        masks.valid,
        masks.protected,
        scores,
        slots=slots,
        dense=full,
        masked=masked,
        lengths=lengths,
        counted=True,
    )


def _chosen_mask(
    selector: Selector,
    scores: Tensor,
    features: Tensor,
    candidates: Candidates,
    masks: Masks,
    settings: Settings,
    inputs: TrainingInputs | None,
) -> Selection:
    n, protected_rows = scores.shape[-1], candidates.ends.rows
    bound = n if candidates.bound is None else candidates.bound
    dense = candidates.valid is None and not selector.data_dependent and not candidates.varied
    budget = selector.budget(drawing=settings.drawing, final=settings.final)
    slots = budget.slots(bound - protected_rows)
    if dense:  # every row has the same number of candidates, so nothing is counted
        k = torch.full(scores.shape[:-1], budget.slots(n - protected_rows), device=scores.device)
    else:
        k = budget.count(scores.detach(), masks.free)
    if not selector.once and not settings.drawing:
        # a query may meet the same keys in computations of different shapes: with and without a cache, or in another batch
        scores = level_ties(scores, k, masks.free, slots)
    # if padding is in the place of a protected row, one more position is free
    most = slots if candidates.valid is None else budget.slots(bound)
    sampling = _sampling(selector, scores, masks.free, inputs, settings) if settings.drawing else None
    features = features.expand(scores.shape[0], -1, -1, -1)
    choice, scores = _ask_estimator(selector, scores, features, k, masks.free, most, sampling)

    mask, gates = choice.mask, _gates(selector, choice, sampling, settings)
    if gates is not None and selector.config.soft_rate and sampling is not None:
        mask, gates = _soften(selector, mask, gates, masks.free, sampling, settings)
    if masks.protected is not None:
        mask = mask | masks.protected
        gates = None if gates is None else gates.masked_fill(masks.protected, 1.0)

    masked, loose = selector.runs_masked(settings), selector.loose(settings)
    # the last monotonic choices may find fewer positions left than the budget
    full, lengths = dense and not loose and not selector.scorer.monotonic, None
    slots += protected_rows
    counts = selector.data_dependent or selector.config.pack or candidates.varied
    if selector.config.estimator == "soft" or loose or (candidates.varied and settings.drawing and masked):
        slots = bound
    elif counts and not (settings.drawing and masked):
        slots, full, lengths = count_slots(selector, mask, masked)
    return Selection(
        selector.site,
        mask,
        masks.valid,
        masks.protected,
        scores,
        gates,
        choice.log_prob,
        choice.entropy,
        _penalty(choice, inputs),
        None if inputs is None else inputs.summary,
        slots=slots,
        dense=full,
        masked=masked,
        lengths=lengths,
        counted=selector.data_dependent,
    )


def _ask_estimator(
    selector: Selector, scores: Tensor, features: Tensor, k: Tensor, free: Tensor, slots: int, sampling: Sampling | None
) -> tuple[Choice, Tensor]:
    """Return the estimator's choice among the ``free`` positions, and the scores that ranked them."""
    with weights_in_place(selector.estimator):
        return _choose(selector, scores, features, k, free, slots, sampling)


def _choose(
    selector: Selector, scores: Tensor, features: Tensor, k: Tensor, free: Tensor, slots: int, sampling: Sampling | None
) -> tuple[Choice, Tensor]:
    if selector.scorer.sequential:
        return look(
            selector.scorer,
            selector.estimator,
            features,
            k.expand(scores.shape[:-1]),
            free,
            slots=slots,
            sampling=sampling,
            halts=selector.halts,
            adaptive=selector.config.backward_temperature == "adaptive",
        )
    if selector.scorer.monotonic:
        passed = (features[..., -1] > 0.5).expand(scores.shape[0], -1, -1)
        k = k.expand(scores.shape[:-1])
        return read_on(selector.estimator, scores, k, free, passed, slots=slots, sampling=sampling), scores
    return selector.estimator.choose(scores, k, free, slots=slots, sampling=sampling), scores


def _sampling(
    selector: Selector, scores: Tensor, free: Tensor, inputs: TrainingInputs | None, settings: Settings
) -> Sampling:
    """Return how this choice in training is drawn; ``scores`` and ``free`` are ``[B, H, Q, N]``."""
    temperature = selector.now(selector.temperature, settings.final)
    backward: float | Tensor | None = None
    if selector.backward_temperature is not None:
        backward = selector.now(selector.backward_temperature, settings.final)
    elif selector.config.backward_temperature == "adaptive":
        backward = spread(scores.detach(), free).clamp(min=temperature)
    posterior = None
    if selector.posterior is not None and inputs is not None and inputs.target is not None:
        posterior = scores.detach() + selector.posterior(inputs.keys, inputs.target, scores.shape[2])
    class_loss = None
    if selector.head is not None and inputs is not None and inputs.classes is not None:
        class_loss = partial(selector.head, inputs.values, classes=inputs.classes)
    return Sampling(
        uniform=lambda size: uniform(size, scores.device, max(0, len(size) - scores.dim())),
        temperature=temperature,
        backward_temperature=backward,
        exploration=selector.now(selector.exploration, settings.final),
        posterior=posterior,
        class_loss=class_loss,
    )


def _gates(selector: Selector, choice: Choice, sampling: Sampling | None, settings: Settings) -> Tensor | None:
    """Return the gates of masked training; None in other calls, where the positions that they would weigh are gone."""
    if choice.gates is None or not settings.drawing or not selector.runs_masked(settings):
        return None
    if selector.posterior is not None and sampling is not None and sampling.posterior is None:
        # no target: give the posterior a zero gradient, since distributed training waits for every parameter
        with weights_in_place(selector.posterior):
            return choice.gates + 0.0 * torch.stack([p.float().sum() for p in selector.posterior.parameters()]).sum()
    return choice.gates


def _soften(
    selector: Selector, mask: Tensor, gates: Tensor, free: Tensor, sampling: Sampling, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Let some rows of the batch keep everything."""
    soft = sampling.uniform((mask.shape[0], 1, 1, 1)) < selector.now(selector.soft_rate, settings.final)
    return torch.where(soft, free, mask), torch.where(soft, free + (gates - gates.detach()), gates)


def _penalty(choice: Choice, inputs: TrainingInputs | None) -> Tensor | None:
    target = None if inputs is None else inputs.target
    penalty = choice.penalty
    if penalty is None or target is None or penalty.shape[-1] != target.shape[1] or target.shape[1] == 1:
        return penalty
    present = (target != 0).any(-1)[:, None]  # a padding query has no target to explain
    return penalty * present * (present.numel() / present.sum().clamp(min=1))
