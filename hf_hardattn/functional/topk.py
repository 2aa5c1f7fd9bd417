"""The exact top-k that makes a discrete choice."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_mask(scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> Tensor:
    """Keep exactly the ``k`` highest-scored valid positions of each row; of equal scores, the lower index is kept.

    Args:
        scores: float ``[..., N]``.
        k: int64 ``[...]``, positions to keep; rows with fewer valid positions keep them all.
        valid: bool, broadcastable to ``scores``.
        slots: upper bound of ``k`` known without reading it (avoids a device synchronisation); N by default.

    Returns:
        bool ``[..., N]`` with ``min(k, valid.sum(-1))`` True per row.
    """
    valid = valid.expand_as(scores)
    if scores.shape[-1] == 0:
        return valid.clone()
    slots = max(1, min(scores.shape[-1] if slots is None else slots, scores.shape[-1]))
    masked = scores.masked_fill(~valid, float("-inf"))
    k = torch.minimum(k.expand(scores.shape[:-1]), valid.sum(-1))
    last = _lowest_kept(masked, k, slots)
    above, equal = masked > last, masked == last
    spare = k.unsqueeze(-1) - above.sum(-1, keepdim=True)
    mask = above | (equal & (equal.cumsum(-1) <= spare))
    return mask & valid


def level_ties(scores: Tensor, k: Tensor, valid: Tensor, slots: int) -> Tensor:
    """Replace scores that differ only by rounding from the lowest kept score with that score, so that they tie.

    Equal tokens have equal scores, but a matrix product may round them differently with another shape of the batch or the cache.

    Args:
        scores: fp32 ``[..., N]``.
        k, valid, slots: as in ``topk_mask``.

    Returns:
        fp32 ``[..., N]``; no score changes by more than ``128`` units in the last place of the largest valid one.
    """
    slots = max(1, min(slots, scores.shape[-1]))
    last = _lowest_kept(scores.masked_fill(~valid, float("-inf")), k.expand(scores.shape[:-1]), slots)
    largest = scores.abs().masked_fill(~valid, 0.0).amax(-1, keepdim=True)
    rounding = 128 * torch.finfo(scores.dtype).eps * largest
    return torch.where((scores - last).abs() <= rounding, last, scores)


def _lowest_kept(scores: Tensor, k: Tensor, slots: int) -> Tensor:
    """Return the ``k``-th largest of ``scores`` ``[..., N]`` as ``[..., 1]``; ``slots`` bounds ``k``."""
    return scores.topk(slots, dim=-1).values.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1))


def mask_to_indices(mask: Tensor, slots: int) -> Tensor:
    """Return the indices of the True entries of each row, ascending, in ``slots`` slots.

    Args:
        mask: bool ``[..., N]`` with at most ``slots`` True per row.
        slots: K, number of slots per row, 1 <= K <= N.

    Returns:
        int64 ``[..., K]``; rows with fewer True entries fill the last slots with indices that are not kept.
    """
    n = mask.shape[-1]
    order = torch.arange(n, 0, -1, device=mask.device, dtype=torch.int32)
    # one top-k both finds the kept positions and sorts them: kept ones rank above all others, lower index first
    return (order + n * mask.to(torch.int32)).topk(slots, dim=-1, sorted=True).indices
