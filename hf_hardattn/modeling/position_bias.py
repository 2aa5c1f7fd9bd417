"""T5's relative position bias between the rows that remain after a selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import position_bias as distances


def bias_table(attention: Any, length: int, device: torch.device) -> Tensor:
    """Return the bias between all rows of a bidirectional layer as a table of distances, ``[H, 2 * length - 1]``.

    It is zero, as in the original model, if the layer that has the bias is not the first one any more.
    """
    if not attention.has_relative_attention_bias:
        return torch.zeros(attention.n_heads, 2 * length - 1, device=device, dtype=attention.q.weight.dtype)
    distance = torch.arange(1 - length, length, device=device)
    bucket = attention._relative_position_bucket(
        distance,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(bucket).t().contiguous()


def own_bias_of_rows(attention: Any, positions: Tensor, length: int) -> Tensor:
    """Return the bias that a UMT5 layer computes itself, ``[B, H, K, K]``, between the remaining rows int64 ``[B, K]`` of ``length``."""
    distance = torch.arange(1 - length, length, device=positions.device)
    table = attention.relative_attention_bias(attention._relative_position_bucket(distance))
    return distances.pairs(table.t(), positions)


def bias_of_rows(bias: Tensor | None, indices: Tensor | None) -> Tensor | None:
    """Return the bias between the remaining rows int64 ``[B, K]``, ``[B, H, K, K]``; unchanged if all rows remain."""
    if bias is None or indices is None:
        return bias
    return distances.pairs(bias, indices) if distances.is_table(bias) else _pairs(bias, indices)


def _pairs(bias: Tensor, indices: Tensor) -> Tensor:
    """Gather queries and keys of a bias: ``[B or 1, H, N, N]`` at int64 ``[B, K]`` to ``[B, H, K, K]``, contiguous."""
    n, heads = bias.shape[-1], bias.shape[1]
    pairs = (indices[:, :, None] * n + indices[:, None, :]).flatten(1)
    if bias.shape[0] == 1:
        kept = bias.reshape(heads, n * n).index_select(1, pairs.flatten()).view(heads, len(indices), -1).transpose(0, 1)
    else:
        kept = bias.reshape(len(bias), heads, n * n).gather(2, pairs[:, None].expand(-1, heads, -1))
    return kept.reshape(len(indices), heads, *2 * (indices.shape[1],)).contiguous()
