"""Position biases that depend only on the distance between key and query (T5's), stored as one number per head and distance.

Shapes: H heads, N positions, B batch, K kept positions. A table is ``[H, 2N - 1]``: column ``key - query + N - 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_table(bias: Tensor | None) -> bool:
    """Return whether a bias is a table of distances rather than a matrix ``[B or 1, H, Q, N]``."""
    return bias is not None and bias.dim() == 2


def reversed_rows(table: Tensor) -> Tensor:
    """Return the bias with its queries in reverse order, ``[1, H, N, N]``: a view of the table with overlapping rows. Nothing is copied."""
    return table.unfold(1, (table.shape[1] + 1) // 2, 1).unsqueeze(0)


def matrix(table: Tensor) -> Tensor:
    """Return the whole bias, ``[1, H, N, N]``, contiguous."""
    return reversed_rows(table).flip(2)


def columns(table: Tensor, indices: Tensor) -> Tensor:
    """Return the bias for the kept keys only, int64 ``[B, H or 1, K]`` to ``[B, H, N, K]``; the other columns are never computed."""
    heads, n = table.shape[0], (table.shape[1] + 1) // 2
    back = torch.arange(n - 1, -1, -1, device=table.device)
    found = indices.unsqueeze(2) + back[:, None]  # [B, H or 1, N, K]
    if indices.shape[1] == 1:
        return table.index_select(1, found.flatten()).view(heads, -1, n, indices.shape[2]).transpose(0, 1)
    return table.expand(len(indices), -1, -1).gather(2, found.flatten(2)).view(found.shape)


def pairs(table: Tensor, positions: Tensor) -> Tensor:
    """Return the bias between the kept positions only, int64 ``[B, K]`` to ``[B, H, K, K]``, contiguous."""
    found = positions[:, None, :] - positions[:, :, None] + (table.shape[1] - 1) // 2
    return table.index_select(1, found.flatten()).view(-1, *found.shape).transpose(0, 1).contiguous()
