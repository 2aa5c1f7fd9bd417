"""The loss of the estimator ``marginal``: every choice of one site is tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions import LOW, ConditionalBernoulli
from ..errors import HardAttentionError
from ..modeling.family import Family
from ..modeling.selection import Selection
from ..modeling.selector import Selector
from ..models import family_of
from ..recording import replay


def marginal_loss(
    model: nn.Module, selector: Selector, selection: Selection, inputs: dict[str, Any], forward: Callable[[], Any]
) -> Tensor:
    """Run ``forward`` once for each choice and weigh the likelihoods of the labels; see ``estimators/marginal.py``.

    Args:
        selection: selection of the deterministic pass; its scores carry the gradient to the scorer.
        forward: the model's own forward on ``inputs``.

    Returns:
        fp32 scalar, a mean over labels like the model's own loss.

    Raises:
        HardAttentionError: no labels (for example with a contrastive loss, which mixes rows), too many choices, a choice per head,
            choices per query that later layers mix, or gradient checkpointing.
    """
    n, site, estimator = selection.mask.shape[-1], selection.site, selector.estimator
    family = _family(model, selection, inputs)
    candidates = selection.valid if selection.protected is None else selection.valid & ~selection.protected
    k = selector.budget(drawing=True).count(selection.scores.detach(), candidates)
    size = int(k.max())
    places = candidates.flatten(0, -2).any(0).nonzero().flatten().tolist()
    count = math.comb(len(places), size)
    if count > estimator.limit or int(k.min()) != size:
        raise HardAttentionError(
            f"{count:,} selections of {size} among {len(places)} positions at '{site}'; estimator 'marginal' tries each, at most "
            f"limit={estimator.limit}, and needs the same count in all rows. Use budget 1, fewer positions, or estimator 'simple'."
        )
    subsets = torch.zeros(count, n, dtype=torch.bool, device=selection.mask.device)
    for row, chosen in enumerate(itertools.combinations(places, size)):
        subsets[row, list(chosen)] = True
    scores = selection.scores[:, 0] / selector.now(selector.temperature)  # [B, Q, N]
    law = ConditionalBernoulli(scores, k[:, 0], candidates[:, 0], size)
    log_p = torch.stack([_log_prob(law, subset, candidates[:, 0]) for subset in subsets])  # [S, B, Q]
    likelihoods, counted = [], None
    protected = torch.zeros((), dtype=torch.bool) if selection.protected is None else selection.protected
    for subset in subsets:
        with replay(model, {site: (subset | protected.to(subset.device)).expand(selection.mask.shape)}):
            losses = family.token_loss(model, inputs, forward())
        if losses is None:
            raise HardAttentionError(
                f"{type(model).__name__} returns no loss per example; estimator 'marginal' at '{site}' needs labels in its inputs."
            )
        counted = losses[1]
        likelihoods.append(-losses[0] * counted)
    log_y = torch.stack(likelihoods)  # [S, B, T]
    if log_y.shape[1] != log_p.shape[1]:
        raise HardAttentionError(
            f"'{site}' chooses in {log_p.shape[1]} rows, and there are labels of {log_y.shape[1]} examples; estimator 'marginal' needs one "
            "row for each. Use estimator 'simple'."
        )
    if log_p.shape[-1] == 1:
        log_y = log_y.sum(-1, keepdim=True)  # one choice for the row, which all its labels share
    elif log_p.shape[-1] != log_y.shape[-1] or not _last(model, site):
        raise HardAttentionError(
            f"each query makes its own selection at '{site}', and later layers mix the queries; estimator 'marginal' supports this only "
            "in the last layer. Use the last layer's site, or a scorer that makes one selection per row."
        )
    if estimator.monotonic:
        if size != 1 or selection.mask.shape[2] == 1:
            raise HardAttentionError(
                f"monotonic=True at '{site}' sums over alignments, one position per label. Use budget 1 and a scorer that selects per query."
            )
        rows = _monotonic(scores, candidates[:, 0], log_y, places, counted)
        return -rows.sum() / (1 if counted is None else counted.sum().clamp(min=1))
    if estimator.objective == "likelihood":
        loss = -torch.logsumexp(log_p + log_y, 0)
    else:
        loss = -(log_p.exp() * log_y).sum(0)
    if counted is not None and loss.shape == counted.shape:
        loss = loss * counted
    return loss.sum() / (1 if counted is None else counted.sum().clamp(min=1))


def _family(model: nn.Module, selection: Selection, inputs: dict[str, Any]) -> Family:
    """Return the model's family, or raise if the choices of this model or call cannot be tried one by one."""
    site, family = selection.site, family_of(model)
    if selection.mask.shape[1] > 1 or family is None:
        raise HardAttentionError(
            f"per_head=True at '{site}'; estimator 'marginal' tries one selection at a time. Use per_head=False."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise HardAttentionError(
            f"estimator 'marginal' at '{site}' does not support gradient checkpointing: it sets the selection of each pass, which a "
            "recomputation would not repeat. Call model.gradient_checkpointing_disable(), or use estimator 'simple'."
        )
    if family.labels(model, inputs) is None:
        raise HardAttentionError(
            f"{type(model).__name__} has no labels to weigh at '{site}'; estimator 'marginal' needs labels, one likelihood for each. "
            "Pass labels, or use estimator 'simple'."
        )
    return family


def _monotonic(scores: Tensor, candidates: Tensor, log_y: Tensor, places: list[int], counted: Tensor | None) -> Tensor:
    """Return the log-likelihood of each row ``[B]``, summed over the alignments that never go back, by the forward algorithm.

    ``alpha_t(n) = p(y_t | n) sum_{m <= n} alpha_{t-1}(m) exp(s_t(n)) / sum_{j >= m} exp(s_t(j))``

    Args:
        scores, candidates: ``[B, T, N]``. log_y: ``[S, B, T]``, log-likelihood of each label if it is read at each of ``places``.
        counted: bool ``[B, T]``, labels that exist; the others do not change the alignment.
    """
    allowed = candidates[..., places]
    logits = scores[..., places].masked_fill(~allowed, LOW)
    said = log_y.permute(1, 2, 0)
    alpha = logits[:, 0].log_softmax(-1) + said[:, 0]
    for label in range(1, logits.shape[1]):
        ahead = logits[:, label].flip(-1).logcumsumexp(-1).flip(-1)
        arrived = (alpha - ahead).masked_fill(~allowed[:, label], LOW).logcumsumexp(-1)
        after = (logits[:, label] + arrived + said[:, label]).masked_fill(~allowed[:, label], LOW)
        alpha = after if counted is None else torch.where(counted[:, label, None], after, alpha)
    return alpha.logsumexp(-1)


def _log_prob(law: ConditionalBernoulli, subset: Tensor, candidates: Tensor) -> Tensor:
    """Return the log-probability of one subset in each row, or ``LOW`` if the subset has a position that is no candidate there."""
    inside = (candidates | ~subset).all(-1)
    return torch.where(inside, law.log_prob(subset.expand(candidates.shape)), LOW)


def _last(model: nn.Module, site: str) -> bool:
    tower, _, layer = site.split(".")
    family = family_of(model)
    return family is not None and int(layer) == len(family.towers(model)[tower].layers) - 1
