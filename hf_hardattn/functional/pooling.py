"""One vector a row of the batch, from the states that a model leaves."""

from __future__ import annotations

from torch import Tensor


def mean_rows(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the rows that are there, fp ``[B, D]``.

    Args:
        hidden: ``[B, K, D]``; rows that a hard model does not use hold zeros.
        mask: of the input, ``[B, N]``, or None; it counts while no row was dropped (K = N).
    """
    present = (hidden.detach() != 0).any(-1)
    if mask is not None and mask.shape == present.shape:
        present &= mask.bool()
    return (hidden * present.unsqueeze(-1)).sum(1) / present.sum(1, keepdim=True).clamp(min=1)
