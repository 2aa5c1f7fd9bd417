"""Pooling of a model's states to one vector per row of the batch."""

from __future__ import annotations

from torch import Tensor


def mean_rows(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of the valid rows, fp ``[B, D]``.

    Args:
        hidden: ``[B, K, D]``; rows that a hard model does not use hold zeros.
        mask: mask of the input, ``[B, N]``, or None; it is used only if no row was dropped (K = N).
    """
    present = (hidden.detach() != 0).any(-1)
    if mask is not None and mask.shape == present.shape:
        present &= mask.bool()
    return (hidden * present.unsqueeze(-1)).sum(1) / present.sum(1, keepdim=True).clamp(min=1)
