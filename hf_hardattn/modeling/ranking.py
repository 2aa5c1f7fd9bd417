"""Selection of the best candidates in rows that keep different numbers of them, with few GPU operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from ..errors import HardAttentionError
from .candidates import Candidates
from .selection import Selection

if TYPE_CHECKING:
    from .selector import Selector


def best_of_ragged_rows(selector: Selector, scores: Tensor, candidates: Candidates) -> Selection:
    """Keep the highest-scored valid candidates of each row, and all protected ones.

    One sort ranks protected candidates before all others and padding after them; a row keeps its first ranks, and a second sort puts
    those in order. The choice is that of ``functional.topk.topk_mask``: of equal scores, the lower index is kept.

    Args:
        scores: fp32 ``[B or 1, H, Q, N]``.
    """
    n, ends = scores.shape[-1], candidates.ends.rows
    budget, counted = selector.budget(drawing=False), selector.data_dependent
    ranked, available, protected = _rank(scores, candidates)
    bound = n if candidates.bound is None else candidates.bound
    slots = n if counted or candidates.varied else budget.slots(bound - ends) + ends
    # stable: of equal scores, the lower index is kept
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
    if counted:
        free = candidates.masks(scores).free
        count = budget.count(scores.detach().expand(free.shape), free).unsqueeze(-1)
        kept = torch.minimum(count + protected, available) > torch.arange(slots, device=scores.device)
    else:
        kept = candidates.noted((budget, slots, candidates.ends), lambda: budget.ranks(slots, available, protected))
    full, lengths = candidates.valid is None, None
    if counted or selector.config.pack or candidates.varied:
        slots, full, lengths = count_slots(selector, kept.expand(order.shape), masked=False)
        order, kept = order[..., :slots], kept[..., :slots]
    # kept indices become negative, and so sort in their order before the unused slots
    indices = torch.add(order, kept, alpha=-n).sort(dim=-1).values % n
    return Selection(
        selector.site,
        None,
        None,
        None,
        scores.expand(*order.shape[:-1], n),
        slots=slots,
        dense=full,
        lengths=lengths,
        indices=indices,
        used=kept,
        candidates=candidates,
        counted=counted,
    )


def _rank(scores: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor, Tensor | int]:
    """Return scores that rank protected candidates first and padding last, ``[B, H, Q, N]``, and two numbers per row.

    These are the number of valid candidates, int64 ``[B, H or 1, Q or 1, 1]``, and of protected ones, as ``Budget.ranks`` reads it.
    """
    ranked, valid, ends = scores.detach(), candidates.valid, candidates.ends
    protected: Tensor | int
    if valid is None or candidates.protected is not None:
        masks = candidates.masks(scores)
        ranked, protected = torch.where(masks.valid, ranked, -torch.inf), 0
        if masks.protected is not None:
            ranked, protected = ranked.masked_fill(masks.protected, torch.inf), masks.protected.sum(-1, keepdim=True)
        return ranked, masks.valid.sum(-1, keepdim=True), protected
    seen = candidates.noted("seen", lambda: valid.cumsum(-1))
    available, protected = seen[..., -1:], int(ends.last)
    if ends.first:
        ranked = nn.functional.pad(ranked[..., ends.first :], (ends.first, 0), value=torch.inf)
        protected = seen[..., ends.first - 1 : ends.first]
    ranked = torch.where(valid, ranked, -torch.inf)
    if ends.last:
        # argmax finds the first of equal counts, which is the last valid candidate
        last = candidates.noted("last", lambda: seen.argmax(-1, keepdim=True))
        ranked = ranked.scatter(-1, last.expand(*ranked.shape[:-1], 1), torch.inf)
        if isinstance(protected, Tensor):
            first = protected
            protected = candidates.noted(("protected", ends), lambda: torch.minimum(first + 1, available))
    return ranked, available, protected


def count_slots(selector: Selector, mask: Tensor, masked: bool) -> tuple[int, bool, tuple[int, ...] | None]:
    """Return the slots that a choice needs, whether every row fills them, and the length of each row if rows are packed.

    Args:
        mask: bool ``[B, H, Q, N or K]``, the kept positions. masked: nothing is gathered.

    This is the only place that waits for the device. A replayed choice is packed if the original choice would be; otherwise the last bits
    would differ.

    Raises:
        HardAttentionError: the numbers cannot be read, or would be recorded as constants.
    """
    kept = mask.sum(-1)
    _refuse_unreadable(selector.site, kept)
    most, least = (int(number) for number in torch.stack((kept.max(), kept.min())).tolist())
    slots = max(1, most)
    wanted = selector.data_dependent if selector.config.pack is None else selector.config.pack
    packs = wanted and not masked and kept.shape[1:].numel() == 1 and least < most
    return slots, least == slots, tuple(kept.flatten().tolist()) if packs else None


def _refuse_unreadable(site: str, kept: Tensor) -> None:
    where = None
    if kept.is_meta:
        where = "on the device 'meta', where numbers have no values"
    elif torch.jit.is_tracing():
        where = "under torch.jit.trace, which would record it as a constant"
    elif not torch.compiler.is_compiling() and is_batchedtensor(kept):
        where = "under torch.vmap, where each example may have another"
    if where is not None:
        raise HardAttentionError(
            f"'{site}' reads how many positions are kept, {where}; only a count or a ratio is known without reading it. Use an int or a float "
            "as the budget, without pack=True and outside hf_hardattn.replay."
        )
