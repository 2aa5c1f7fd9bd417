"""Biases that depend on the distance between key and query alone (T5's): one number per head and distance holds them all.

Shapes: H heads, N places, B batch, K kept places. A table is ``[H, 2N - 1]``: column ``key - query + N - 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_table(bias: Tensor | None) -> bool:
    """Whether a bias is a table of distances rather than a matrix ``[B or 1, H, Q, N]``."""
    return bias is not None and bias.dim() == 2


def reversed_rows(table: Tensor) -> Tensor:
    """The bias with its queries in reverse order, ``[1, H, N, N]``: a view of the table, whose rows overlap. Nothing is copied."""
    return table.unfold(1, (table.shape[1] + 1) // 2, 1).unsqueeze(0)


def matrix(table: Tensor) -> Tensor:
    """The whole bias, ``[1, H, N, N]``, contiguous."""
    return reversed_rows(table).flip(2)


def columns(table: Tensor, indices: Tensor) -> Tensor:
    """The bias towards the kept keys alone, int64 ``[B, H or 1, K]`` to ``[B, H, N, K]``; the other columns are never made."""
    heads, n = table.shape[0], (table.shape[1] + 1) // 2
    back = torch.arange(n - 1, -1, -1, device=table.device)
    found = indices.unsqueeze(2) + back[:, None]  # [B, H or 1, N, K]
    if indices.shape[1] == 1:
        return table.index_select(1, found.flatten()).view(heads, -1, n, indices.shape[2]).transpose(0, 1)
    return table.expand(len(indices), -1, -1).gather(2, found.flatten(2)).view(found.shape)


def pairs(table: Tensor, positions: Tensor) -> Tensor:
    """The bias between the kept places alone, int64 ``[B, K]`` to ``[B, H, K, K]``, contiguous."""
    found = positions[:, None, :] - positions[:, :, None] + (table.shape[1] - 1) // 2
    return table.index_select(1, found.flatten()).view(-1, *found.shape).transpose(0, 1).contiguous()
