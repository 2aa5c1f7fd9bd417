"""Pure functions for attention over a selection, with masked or gathered execution.

Shapes: B batch, H heads, Q queries, N candidates, K slots, D state size, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import position_bias as distances
from .varlen import Packing

# A dropped position may outscore the kept ones by this much before its gate's gradient saturates (at e^5): T5's logits are not
# scaled, and one dropped token that outscores the kept ones by 13 nats would otherwise decide the direction of a whole step.
_MAX_EXPONENT = 5.0


def keep_rows(states: Tensor, indices: Tensor) -> Tensor:
    """Gather rows: ``[B, N, D]`` by int64 ``[B, K]`` to ``[B, K, D]``."""
    if states.is_cuda:
        return states.gather(1, indices.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
    # on a CPU, index_select gathers whole rows ten times as fast as gather
    batch, n, size = states.shape
    flat = indices if batch == 1 else indices + torch.arange(0, batch * n, n, device=indices.device).unsqueeze(-1)
    return states.reshape(batch * n, size).index_select(0, flat.flatten()).view(batch, -1, size)


def keep_heads(states: Tensor, indices: Tensor) -> Tensor:
    """Gather rows per head: ``[B, H, N, d]`` by int64 ``[B, H or 1, K]`` to ``[B, H, K, d]``."""
    batch, heads, n, size = states.shape
    indices = indices.expand(batch, heads, -1)
    return keep_rows(states.reshape(batch * heads, n, size), indices.reshape(batch * heads, -1)).view(
        batch, heads, -1, size
    )


def keep_columns(bias: Tensor, indices: Tensor) -> Tensor:
    """Gather key columns of a bias: ``[B or 1, H or 1, Q, N]`` or a table of distances, by int64 ``[B, H or 1, K]``, to ``[B, H, Q, K]``."""
    if distances.is_table(bias):
        return distances.columns(bias, indices)
    if bias.shape[0] == 1 and indices.shape[:2] == (1, 1):
        return bias.index_select(-1, indices[0, 0])
    batch, heads = max(bias.shape[0], indices.shape[0]), max(bias.shape[1], indices.shape[1])
    queries, slots = bias.shape[2], indices.shape[-1]
    columns = indices.unsqueeze(2).expand(batch, heads, queries, slots)
    return bias.expand(batch, heads, -1, -1).gather(-1, columns)


def fits(bias: Tensor, indices: Tensor) -> bool:
    """Return whether the columns of a bias at int64 ``[B, H or 1, K]`` take no more memory than the whole bias as a matrix.

    Gathering turns a bias that all examples share into one per example.
    """
    shared = distances.is_table(bias) or len(bias) == 1
    return not shared or len(indices) * indices.shape[-1] <= _keys(bias)


def _keys(bias: Tensor) -> int:
    """Return the number of keys that a bias, or a table of distances, covers."""
    return (bias.shape[1] + 1) // 2 if distances.is_table(bias) else bias.shape[-1]


def restore_rows(states: Tensor, indices: Tensor, kept: Tensor | None, length: int) -> Tensor:
    """Scatter rows back: ``[B, K, D]`` to ``[B, length, D]``, all-zero rows where nothing was kept (``kept``: bool ``[B, K]``)."""
    if kept is not None:
        states = torch.where(kept.unsqueeze(-1), states, 0.0)
    full = states.new_zeros(states.shape[0], length, states.shape[-1])
    return full.scatter(1, indices.unsqueeze(-1).expand_as(states), states)


def as_bool(mask: Tensor | None) -> Tensor | None:
    """Read an attention mask of Transformers (bool, or additive float with a very negative number) as bool, True = may attend."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    weights: bool = False,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute softmax attention, ``softmax(scale * q k + bias) v``, over the allowed keys.

    Args:
        query: ``[B, H, Q, d]``. key, value: ``[B, H, N, d]``.
        allowed: bool, broadcastable to ``[B, H, Q, N]``; a row that allows nothing attends to everything, and stays finite.
        bias: broadcastable to ``[B, H, Q, N]``, or a table of distances ``[H, 2N - 1]`` if Q = N (see ``position_bias``).
        weights: also return the attention weights (without PyTorch's fused kernel).
        logits: ``scale * q k``, ``[B, H, Q, N]``, if they are known already (also without the fused kernel).

    Returns:
        output ``[B, H, Q, d]``, and weights ``[B, H, Q, N]`` or None.
    """
    if allowed is not None:
        allowed = allowed | ~allowed.any(-1, keepdim=True)
    if bias is not None and distances.is_table(bias):
        if allowed is None and not weights and logits is None and not query.is_cuda:
            # with the queries in reverse order, the bias is a view of its table; CUDA's kernels need aligned rows, and would copy it
            output = nn.functional.scaled_dot_product_attention(
                query.flip(2), key, value, distances.reversed_rows(bias.to(query.dtype)), dropout_p=dropout, scale=scale
            )
            return output.flip(2), None
        bias = distances.matrix(bias)
    if not weights and logits is None:
        mask = allowed
        if bias is not None:
            mask = bias.to(query.dtype)
            if allowed is not None:
                mask = mask.masked_fill(~allowed, torch.finfo(query.dtype).min)
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale), None
    logits = query @ key.transpose(-1, -2) * scale if logits is None else logits
    if bias is not None:
        logits = logits + bias
    if allowed is not None:
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    probabilities = nn.functional.dropout(logits.float().softmax(-1).to(query.dtype), dropout)
    return probabilities @ value, probabilities


def attend_by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    bias: Tensor,
    *,
    scale: float,
    allowed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Run ``attend`` on kept keys for a few examples at a time, so that their gathered bias takes no more memory than the whole bias.

    Args:
        query: ``[B, H, Q, d]``. key, value: the kept ones, ``[B, H, K, d]``. indices: int64 ``[B, H or 1, K]``, their positions.
        bias: bias for all N positions, ``[1, H, Q, N]`` or a table of distances. allowed: bool, broadcastable to ``[B, H, Q, K]``.
        scale, dropout: as in ``attend``.
    """
    few, outputs = max(1, _keys(bias) // indices.shape[-1]), []
    for start in range(0, len(query), few):
        part = slice(start, start + few)
        used = allowed[part] if allowed is not None and len(allowed) > 1 else allowed
        options: dict[str, Any] = dict(scale=scale, dropout=dropout, bias=keep_columns(bias, indices[part]))
        outputs.append(attend(query[part], key[part], value[part], allowed=used, **options)[0])
    return torch.cat(outputs)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from each row to its own packed keys; the rows of each length are a batch without padding and need no mask.

    Args:
        query: ``[1, H, T, d]``, packed like the keys; or ``[B, H, Q, d]``.
        key, value: ``[1, H, T, d]``.
        bias: ``[B or 1, H, K or Q, K]``, padded, or None.

    Returns:
        ``[1, T, H * d]``, or ``[B, Q, H * d]``.
    """
    packed, outputs = len(query) == 1, []
    for rows, (own, keys, values) in packing.batches(query if packed else key, key, value):
        own, part = own if packed else query.index_select(0, rows), None
        if bias is not None:
            part = (bias if len(bias) == 1 else bias.index_select(0, rows))[:, :, : own.shape[2], : keys.shape[2]]
        output, _ = attend(own, keys, values, scale=scale, bias=part, dropout=dropout)
        outputs.append(output.transpose(1, 2).flatten(2))
    if packed:
        return torch.cat([output.flatten(0, 1) for output in outputs]).unsqueeze(0)
    return torch.cat(outputs).index_select(0, packing.back)


def gated_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    *,
    scale: float,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention with multiplicative gates, ``w_n = g_n exp(s_n) / sum_m g_m exp(s_m)``.

    In the forward pass, this equals softmax over the positions whose gate is 1. The derivative with respect to a gate at 0 is
    ``exp(s_n) (v_n - out) / Z``, which is finite: dropped positions keep a gradient, which an additive -inf would remove.

    Args:
        gates: fp32, broadcastable to ``[B, H, Q, N]``, in [0, 1].
        Others as in ``attend``. All-zero gates in a row fall back to attending to everything allowed.

    Source: DynamicViT (Rao et al., 2021), equation 11. Cost: dense; it saves nothing. Every pathwise estimator uses it.
    """
    logits = (query @ key.transpose(-1, -2)).float() * scale if logits is None else logits.float()
    if bias is not None:
        logits = logits + (distances.matrix(bias) if distances.is_table(bias) else bias).float()
    if allowed is not None:
        gates = gates * (allowed | ~allowed.any(-1, keepdim=True))
    gates = gates + (gates.detach() <= 0).all(-1, keepdim=True)
    # the maximum over kept positions only, so that the sum stays within fp32 whatever the dropped ones score
    top = logits.detach().masked_fill(gates.detach() <= 0, float("-inf")).amax(-1, keepdim=True)
    weights = gates * (logits - top).clamp(max=_MAX_EXPONENT).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    probabilities = nn.functional.dropout(weights.to(query.dtype), dropout)
    return probabilities @ value, probabilities


def multiply_gates(chosen: Tensor | None, upstream: Tensor | None) -> Tensor | None:
    """Multiply the gates of a choice ``[B, H, Q, N]`` by those of earlier sites ``[B, N]``; None stands for all ones."""
    if upstream is None:
        return chosen
    upstream = upstream[:, None, None, :]
    return upstream if chosen is None else chosen * upstream


def gates_at(gates: Tensor, indices: Tensor) -> Tensor:
    """Return the gates ``[B, H or 1, 1, N]`` at the kept positions ``[B, H, K]``, as ``[B, H, 1, K]``."""
    return gates.expand(len(indices), indices.shape[1], 1, -1).gather(-1, indices.unsqueeze(2))


def spread_weights(weights: Tensor, indices: Tensor, n: int) -> Tensor:
    """Scatter attention weights over the kept slots ``[B, H, Q, K]`` to all keys ``[B, H, Q, n]``, zero where nothing was kept."""
    positions = indices.unsqueeze(2).expand(-1, weights.shape[1], weights.shape[2], -1)
    # unused slots repeat a position; their weight is zero, so adding is safe
    return weights.new_zeros(*weights.shape[:3], n).scatter_add(-1, positions, weights)
