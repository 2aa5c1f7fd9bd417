"""Attention masks of the rows that remain after a selection, in the form that each attention implementation reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask

from ..errors import HardAttentionError
from ..functional.attention import as_bool
from .plan import LayerPlan
from .state import TowerState


def padding_mask(valid: Tensor | None, config: Any, hidden: Tensor, source: Tensor | None = None) -> Any:
    """Return a mask that hides only unused slots and padding.

    Args:
        valid: bool ``[B, K]``; None if every row is valid, so that no mask is needed.
        config: configuration of the tower; its ``_attn_implementation`` determines the form.
        hidden: ``[B, Q, D]``, the queries. source: ``[B, K, D]``, the keys' states, if they are not the queries'.

    Returns:
        None; bool ``[B, 1, 1, K]`` for SDPA; an additive mask for eager; for any other implementation, what its mask function makes of
        the 2-D mask (flash attention reads that itself, flex attention a ``BlockMask``).

    Raises:
        HardAttentionError: if the implementation has no mask function.
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
            f"the registered attention '{implementation}' makes no masks, so it would attend to padding and to unused "
            "slots. Register a mask function with AttentionMaskInterface, or use a fixed budget and no padding."
        )
    extra: dict[str, Any] = {} if source is None else {"encoder_hidden_states": source}
    return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=valid, **extra)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask to numbers that are added to the logits."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def row_mask(state: TowerState, plan: LayerPlan, config: Any, hidden: Tensor, given: Any) -> Any:
    """Return the mask of a layer after a selection, or ``given`` while nothing has been dropped.

    A mask that differs between queries (the caller's own, or a window) is gathered row by row. Any other mask hides only padding and is
    created anew.

    Raises:
        HardAttentionError: if the implementation counts a window in rows, some of which are missing.
    """
    if plan.windows and (state.dropped or plan.own or plan.follows is not None):
        _refuse_counted_window(config._attn_implementation, plan)
    if not state.dropped:
        return given
    if (plan.windows or plan.causal) and isinstance(given, BlockMask):
        return state.shared(given, lambda: block_mask_of_rows(state, given, hidden))
    by_place = plan.windows or plan.causal or state.per_query
    if by_place and isinstance(given, Tensor) and differs_between_queries(given):
        return state.shared(given, lambda: _mask_of_rows(state, given, hidden.dtype))
    if plan.causal and state.valid is not None and not config._attn_implementation.startswith("flash"):
        seen = causal_mask(hidden.shape[1], hidden.device) & state.valid[:, None, None, :]
        return additive(seen, hidden.dtype) if config._attn_implementation == "eager" else seen
    if plan.eager_only:
        return None if state.valid is None else state.valid[:, None, None, :]
    return padding_mask(state.valid, config, hidden)


def _refuse_counted_window(implementation: str, plan: LayerPlan) -> None:
    if implementation.startswith("flash"):
        raise HardAttentionError(
            f"attn_implementation='{implementation}' is not supported at sites of '{plan.tower}', whose layers have a sliding window; its "
            "kernel counts rows, and dropped rows are missing. Use attn_implementation='sdpa' or 'eager'."
        )


def block_mask_of_rows(state: TowerState, mask: BlockMask, hidden: Tensor, width: int | None = None) -> BlockMask:
    """Return flex attention's mask between the remaining rows ``[B, K, D]``.

    Args:
        width: number of keys, of which those behind the rows are hidden; None if they are the rows.
    """
    batch, rows = hidden.shape[:2]
    positions, valid = state.positions, state.valid

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = k.clamp(max=rows - 1)
        places = (q, row) if positions is None else (positions[b, q], positions[b, row])
        seen = mask.mask_mod(b, h, *places) & (k < rows)
        return seen if valid is None else seen & valid[b, row]

    return create_block_mask(allowed, batch, None, rows, width or rows, device=hidden.device)


def _mask_of_rows(state: TowerState, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Restrict a mask that differs between queries to the remaining rows."""
    if state.positions is not None:
        mask = gather_keys(gather_queries(mask, state.positions), state.positions[:, None])
    if state.valid is None:
        return mask
    hidden = ~state.valid[:, None, None, :]
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(dtype).min)


def causal_mask(rows: int, device: torch.device) -> Tensor:
    """Return the causal mask between ``rows`` queries and keys, bool ``[1, 1, Q, N]``."""
    return torch.ones(rows, rows, dtype=torch.bool, device=device).tril()[None, None]


def row_of_padding(mask: Any) -> Any:
    """Return one query's row of a mask that hides only padding, as a view; Transformers may have made a copy for each query."""
    return mask[:, :, :1] if isinstance(mask, Tensor) and mask.dim() == 4 else mask


def differs_between_queries(mask: Tensor) -> bool:
    """Return whether a mask ``[B, H, Q, N]`` may hide other keys from each query; one that is broadcast to all queries cannot."""
    return mask.dim() == 4 and mask.shape[2] > 1 and mask.stride(2) != 0


def opened(mask: Tensor, indices: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a per-query mask over the kept keys, and the queries that may read none of them.

    Such a query gets a mask that allows everything, which keeps its softmax finite; its output is to be silenced.

    Args:
        mask: bool ``[B, H or 1, Q, N]``. indices: int64 ``[B, H or 1, K]``; None while no key has been removed.
        kept: bool, broadcastable to ``[B, H or 1, Q, K]``; None for all.

    Returns:
        bool ``[B, H or 1, Q, K]`` and ``[B, H or 1, Q, 1]``.
    """
    allowed = mask if indices is None else gather_keys(mask, indices)
    blind = ~(allowed if kept is None else allowed & kept).any(-1, keepdim=True)
    return allowed | blind, blind


def silence(output: Tensor, blind: Tensor) -> Tensor:
    """Set attended values ``[B, Q, H * d]`` to zero for queries that read nothing, bool ``[B, H or 1, Q, 1]``."""
    heads = output.unflatten(-1, (blind.shape[1], -1))
    return heads.masked_fill(blind.transpose(1, 2), 0.0).flatten(2)


def gather_keys(mask: Tensor, indices: Tensor) -> Tensor:
    """Gather the columns of ``[B or 1, H or 1, Q, N]`` at int64 ``[B, H or 1, K]``."""
    batch, heads = max(mask.shape[0], indices.shape[0]), max(mask.shape[1], indices.shape[1])
    columns = indices.unsqueeze(2).expand(batch, heads, mask.shape[2], -1)
    return mask.expand(batch, heads, -1, -1).gather(-1, columns)


def gather_queries(mask: Tensor, positions: Tensor) -> Tensor:
    """Gather the rows of ``[B or 1, H or 1, N, N]`` at int64 ``[B, K]``."""
    rows = positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
    return mask.expand(len(positions), -1, -1, -1).gather(2, rows)


def combine(mask: Any, allowed: Tensor | None, dtype: torch.dtype) -> Any:
    """Return ``mask`` (bool, additive or None) in the same form, but also hide what ``allowed`` hides."""
    if allowed is None:
        return mask
    if mask is None:
        return allowed
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)


def as_allowed(mask: Any) -> Tensor | None:
    """Convert a mask in any form to bool ``[B, H or 1, Q or 1, N]``, True = may attend; None if it hides nothing."""
    if isinstance(mask, BlockMask):
        batch, heads, queries, keys = mask.shape
        return create_mask(mask.mask_mod, batch, heads, queries, keys, device=mask.kv_indices.device)
    if mask is None or isinstance(mask, Tensor) and mask.dim() == 4:
        return as_bool(mask)
    return mask[:, None, None, :].bool() if isinstance(mask, Tensor) else None
