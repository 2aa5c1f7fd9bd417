"""Attention masks of the rows that a selection left, in the form that each attention implementation reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask

from ..errors import HardAttentionError
from ..functional.attention import as_bool
from .state import TowerState


def padding_mask(valid: Tensor | None, config: Any, hidden: Tensor, source: Tensor | None = None) -> Any:
    """The mask that hides unused slots and padding, and nothing else.

    Args:
        valid: bool ``[B, K]``; None when every row counts, then no mask is needed.
        config: of the tower; its ``_attn_implementation`` decides the form.
        hidden: ``[B, Q, D]``, the queries. source: ``[B, K, D]``, the keys' states, when they are not the queries'.

    Returns:
        None; bool ``[B, 1, 1, K]`` for SDPA; an additive mask for eager; whatever the mask function of any other
        implementation makes of the 2-D mask (flash attention reads that itself, flex attention a ``BlockMask``).

    Raises:
        HardAttentionError: the implementation makes no masks.
    """
    if valid is None:
        return None
    implementation = config._attn_implementation
    if implementation == "sdpa":
        return valid[:, None, None, :]
    if implementation == "eager":
        return additive(valid[:, None, None, :], hidden.dtype)
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        raise HardAttentionError(
            f"the registered attention '{implementation}' makes no masks, so it would attend to padding and to slots that a selection left "
            "empty. Register a mask function with AttentionMaskInterface, or use a fixed budget and no padding."
        )
    extra: dict[str, Any] = {} if source is None else {"encoder_hidden_states": source}
    return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=valid, **extra)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers added to the logits."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def row_mask(state: TowerState, config: Any, hidden: Tensor, given: Any, plain: bool = False) -> Any:
    """The mask of a layer behind a selection; ``given`` while nothing was dropped.

    Args:
        plain: the layer's attention is computed by SDPA, whatever the configuration says.
    """
    if not state.dropped:
        return given
    if state.query_mask is None and plain:
        return None if state.valid is None else state.valid[:, None, None, :]
    if state.query_mask is None:
        return padding_mask(state.valid, config, hidden)
    return per_query_mask(state, hidden.dtype)


def per_query_mask(state: TowerState, dtype: torch.dtype) -> Tensor:
    """The caller's mask that differs between queries, at the rows that are left."""
    mask: Any = state.query_mask
    if state.positions is not None:
        mask = gather_keys(gather_queries(mask, state.positions), state.positions[:, None])
    if state.valid is None:
        return mask
    hidden = ~state.valid[:, None, None, :]
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(dtype).min)


def gather_keys(mask: Tensor, indices: Tensor) -> Tensor:
    """Columns of ``[B or 1, H or 1, Q, N]`` at int64 ``[B, H or 1, K]``."""
    batch, heads = max(mask.shape[0], indices.shape[0]), max(mask.shape[1], indices.shape[1])
    columns = indices.unsqueeze(2).expand(batch, heads, mask.shape[2], -1)
    return mask.expand(batch, heads, -1, -1).gather(-1, columns)


def gather_queries(mask: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``[B or 1, H or 1, N, N]`` at int64 ``[B, K]``."""
    rows = positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
    return mask.expand(len(positions), -1, -1, -1).gather(2, rows)


def combine(mask: Any, allowed: Tensor | None, dtype: torch.dtype) -> Any:
    """Hide from ``mask`` (bool, additive or None) what ``allowed`` hides too, in the same form."""
    if allowed is None:
        return mask
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)


def as_allowed(mask: Any) -> Tensor | None:
    """A 4-D mask as bool, True = may attend; None when it hides nothing."""
    if mask is None or isinstance(mask, Tensor) and mask.dim() == 4:
        return as_bool(mask)
    return mask[:, None, None, :].bool() if isinstance(mask, Tensor) else None
