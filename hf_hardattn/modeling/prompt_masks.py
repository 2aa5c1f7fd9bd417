"""Attention masks of a decoder whose layers keep different rows of a prompt."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import create_causal_mask

from ..errors import HardAttentionError
from .masks import additive, block_mask_of_rows
from .prompt_memory import CachedRows

_BY_POSITION = ("sdpa", "eager", "flex_attention")  # implementations that read a per-query mask


class Places(NamedTuple):
    """Maps the rows of a cache to their positions in the text, for windows.

    Attributes:
        positions: positions of the prompt's rows, int64 ``[B, K]``. rows: N, rows of the prompt.
    """

    positions: Tensor
    rows: int

    def of(self, batch: Any, row: Any) -> Any:
        """Return the position of a row of one example in the text."""
        count = self.positions.shape[1]
        place = self.positions[batch, row.clamp(max=count - 1)]
        return torch.where(row < count, place, row - count + self.rows)


def prefill_mask(
    state: Any, config: Any, hidden: Tensor, given: Any, cache: Any, layer: int, window: int | None
) -> Any:
    """Return the mask over the rows of the prompt that remain after a selection.

    Args:
        given: mask over all rows of the prompt, in any form.
    """
    positions, valid = state.positions, state.valid
    if isinstance(given, Tensor) and given.dim() == 2:
        return valid  # flash attention reads which rows are valid
    if given is None and valid is None and window is None:
        return None
    count = hidden.shape[1]
    if given is None:
        places = None if positions is None else Places(positions, state.length)
        return rows_mask(CachedRows(count, valid, positions), config, hidden, cache, layer, window, places)
    if isinstance(given, BlockMask):
        return block_mask_of_rows(
            state, given, hidden, None if cache is None else cache.get_mask_sizes(count, layer)[0]
        )
    if positions is not None:
        # gather rows and columns of the caller's mask, to preserve windows, packed texts and the user's own masks
        batch = len(positions)
        rows = positions[:, None, :, None].expand(-1, given.shape[1], -1, given.shape[-1])
        columns = positions[:, None, None, :].expand(-1, given.shape[1], count, -1)
        given = given.expand(batch, -1, -1, -1).gather(2, rows).gather(3, columns)
        width = count if cache is None else cache.get_mask_sizes(count, layer)[0]
        hidden_value: Any = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
        given = nn.functional.pad(given, (0, width - count), value=hidden_value)
    if valid is None:
        return given
    used = nn.functional.pad(valid, (0, given.shape[-1] - count), value=True)[:, None, None]
    return given & used if given.dtype == torch.bool else given.masked_fill(~used, torch.finfo(given.dtype).min)


def step_mask(
    rows: CachedRows,
    later: Tensor | None,
    config: Any,
    hidden: Tensor,
    cache: Any,
    layer: int,
    window: int | None,
    n: int,
) -> Any:
    """Return the mask of rows after a prompt, over the cache of one layer.

    Args:
        later: mask of the rows generated since, bool ``[B, M]``, or None. n: number of rows of the prompt.
    """
    fixed = cache.layers[layer].is_compileable
    if hidden.shape[1] == 1 and rows.valid is None and later is None and window is None and not fixed:
        return None
    places = None if rows.positions is None else Places(rows.positions, n)
    return rows_mask(rows, config, hidden, cache, layer, window, places, later)


def rows_mask(
    rows: CachedRows,
    config: Any,
    hidden: Tensor,
    cache: Any,
    layer: int,
    window: int | None,
    places: Places | None,
    later: Tensor | None = None,
) -> Any:
    """Return a causal mask over the rows in a layer's cache and those of this call, in the form of the implementation.

    A window is counted in positions of the text. The cache of a sliding layer forgets by the number of rows, and so never too early.
    """
    if window is not None and config._attn_implementation not in _BY_POSITION:
        raise HardAttentionError(
            f"attn_implementation='{config._attn_implementation}' counts the rows of a sliding window, where dropped rows leave gaps. "
            "Use attn_implementation='sdpa', 'eager' or 'flex_attention'."
        )
    queries = hidden.shape[1]
    width, offset = (queries, 0) if cache is None else cache.get_mask_sizes(queries, layer)
    full = None
    if rows.valid is not None or later is not None:
        kept = hidden.new_ones(len(hidden), rows.count, dtype=torch.bool) if rows.valid is None else rows.valid
        full = kept if later is None else torch.cat((kept, later.to(kept.device)), 1)
        full = nn.functional.pad(full, (0, max(0, width + offset - full.shape[1])), value=True)
    extra: dict[str, Any] = {}
    if window is not None:
        extra["and_mask_function"] = lambda b, h, q, kv: _place(places, b, q) - _place(places, b, kv) < window
    return create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=full, past_key_values=cache, layer_idx=layer, **extra
    )


def _place(places: Places | None, batch: Any, row: Any) -> Any:
    return row if places is None else places.of(batch, row)


def dense_mask(state: Any, hidden: Tensor, window: int | None) -> Tensor:
    """Return which keys each row of one text may read, bool ``[B or 1, 1, N, N]``, for attention computed here."""
    count = hidden.shape[1]
    places = torch.arange(count, device=hidden.device).unsqueeze(0) if state.positions is None else state.positions
    distance = places[:, :, None] - places[:, None, :]
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    allowed = allowed.unsqueeze(1)
    return allowed if state.valid is None else allowed & state.valid[:, None, None]


def as_form(allowed: Tensor, implementation: str, dtype: torch.dtype, site: str) -> Tensor:
    """Convert a per-query bool mask to the form that the attention implementation reads.

    Raises:
        HardAttentionError: if it reads no such mask.
    """
    if implementation == "sdpa":
        return allowed
    if implementation == "eager":
        return additive(allowed, dtype)
    raise HardAttentionError(
        f"attn_implementation='{implementation}' does not support labels at '{site}': the answer reads fewer keys than the prompt, which requires "
        "a separate mask for each query. Use attn_implementation='sdpa' or 'eager'."
    )
