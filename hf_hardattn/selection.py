"""The outcome of a discrete choice, and the exact top-k that makes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Selection:
    """What one site kept in one forward pass.

    Shapes: B batch, H heads (1 when shared), Q queries (1 when shared), N candidates, K slots (K >= kept).

    Attributes:
        site: name of the site, ``tower.kind.layer``.
        mask: bool ``[B, H, Q, N]``, True where the position is kept; never True where ``valid`` is False.
        valid: bool, broadcastable to ``mask``; False for padding, and for the future in causal attention.
        required: bool, broadcastable to ``mask``; kept always, not a choice (CLS, a T5 row's ``</s>``).
        scores: fp32, broadcastable to ``mask``; higher = keep.
        gates: fp32, shape of ``mask`` or None; 1 at kept positions in the forward, the estimator's gradient in the backward.
        log_prob: fp32 ``[B, H, Q]`` or None; log-probability of the sampled choice under the estimator's own law.
        entropy: fp32 ``[B, H, Q]`` or None; entropy of that law, in nats.
        slots: K, an upper bound of kept positions per row (static where the budget allows it).
        positions: int64 ``[B, N]`` or None; place of each candidate in the tower's input, once earlier sites dropped some.
        penalty: fp32 ``[B, H, Q]`` or None; a term of the training loss.
        summary: fp32 ``[B, D]`` or None; mean of the candidates' states, detached, for a learned baseline.
        dense: every row is known to fill all its slots, without asking the device.
        lengths: kept positions of each of the B rows (H = Q = 1), where the host had to ask; None otherwise.
        masked: all candidates are computed on, and the choice weighs them; False: what was dropped is not computed on.
    """

    site: str
    mask: Tensor
    valid: Tensor
    required: Tensor | None
    scores: Tensor
    gates: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None
    penalty: Tensor | None = None
    summary: Tensor | None = None
    slots: int = 0
    dense: bool = False
    masked: bool = False
    positions: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def own(self) -> Selection:
        """The selection as its site made it: a recording's works out what no estimator gave."""
        return self

    @property
    def indices(self) -> Tensor:
        """Kept positions, int64 ``[B, H, Q, K]``, ascending; unused slots come last (see ``slot_mask``)."""
        return mask_to_indices(self.mask, self.slots)

    @property
    def slot_mask(self) -> Tensor:
        """Bool ``[B, H, Q, K]``: True where the slot of ``indices`` holds a kept position."""
        return self.mask.gather(-1, self.indices)

    @property
    def places(self) -> Tensor:
        """``indices`` as places in the tower's input, int64 ``[B, H, Q, K]``: what a rationale shows."""
        if self.positions is None:
            return self.indices
        positions = self.positions[:, None, None].expand(-1, *self.mask.shape[1:3], -1)
        return positions.gather(-1, self.indices.expand(positions.shape[0], -1, -1, -1))

    @property
    def kept_ratio(self) -> Tensor:
        """Kept share of the valid candidates, fp32 ``[B, H, Q]``; what is required counts on neither side."""
        choice, candidates = self.mask, self.valid.expand_as(self.mask)
        if self.required is not None:
            choice, candidates = choice & ~self.required, candidates & ~self.required
        return choice.sum(-1) / candidates.sum(-1).clamp(min=1)


def topk_mask(scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> Tensor:
    """Keep exactly the ``k`` highest-scored valid positions of each row, ties to the lower index.

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
    last = masked.topk(slots, dim=-1).values.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1))
    above, equal = masked > last, masked == last
    spare = k.unsqueeze(-1) - above.sum(-1, keepdim=True)
    mask = above | (equal & (equal.cumsum(-1) <= spare))
    return mask & valid


def mask_to_indices(mask: Tensor, slots: int) -> Tensor:
    """Positions of the True entries of each row, ascending, in ``slots`` places.

    Args:
        mask: bool ``[..., N]`` with at most ``slots`` True per row.
        slots: K, number of places per row, 1 <= K <= N.

    Returns:
        int64 ``[..., K]``; rows with fewer True entries fill the last places with positions that are not kept.
    """
    n = mask.shape[-1]
    order = torch.arange(n, 0, -1, device=mask.device, dtype=torch.int32)
    # one top-k both finds the kept positions and sorts them: kept ones rank above all others, lower index first
    return (order + n * mask.to(torch.int32)).topk(slots, dim=-1, sorted=True).indices
