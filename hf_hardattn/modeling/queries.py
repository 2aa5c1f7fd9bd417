"""Choices that differ between queries: scorers that read the query, and causal attention, where a query reads only its past."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import HardAttentionError
from ..functional.attention import gated_attend, gates_at, keep_columns, keep_heads, multiply_gates, spread_weights
from .attention import AttentionCall
from .cache import pack_features, unpack_features
from .candidates import Candidates
from .context import ForwardContext, Settings
from .glimpses import before
from .masks import as_allowed
from .selection import Selection
from .selector import Selector


def attend_per_query(
    call: AttentionCall, selector: Selector, context: ForwardContext, gates: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose the keys of each query inside its attention, then attend to them.

    Args:
        call: the attention's arguments. selector: selector of the site. context: context of the model's call.
        gates: ``[B, N]``, from masked training at earlier sites.

    Returns:
        ``[B, Q, H * d]``, and weights ``[B, H, Q, N]`` if requested.
    """
    settings = context.settings(selector)
    query = call.query
    key, value, features, logits = _keys_and_features(call, selector, settings, query)
    allowed = allowed_keys(call.mask, query.shape[2], key.shape[2], selector.causal, query.device)
    valid = allowed
    if gates is not None:
        present = gates.detach()[:, None, None] > 0
        valid = present if valid is None else valid & present
    inputs = None
    if call.cache is None or not call.cache.filled:
        inputs = selector.training_inputs(call.source, None, context, settings)
    selection = selector(features, Candidates(valid), settings, queries=call.hidden, inputs=inputs)
    if selector.scorer.monotonic and call.cache is not None:
        # the next step continues from here, in its own beam
        call.cache.mark_passed(query.shape[-1], selector.heads, before(selection.mask[:, :, -1]))
    context.add(selection, settings)
    if query.shape[2] == 1 and not selection.masked:
        return _attend_gathered(call, query, key, value, selection, gates, logits)
    used = allowed if selection.gates is not None else selection.mask
    total = multiply_gates(selection.gates, gates)
    return attend_to(call, query, key, value, used, total, logits)


def _keys_and_features(
    call: AttentionCall, selector: Selector, settings: Settings, query: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return keys and values, including those of earlier steps, the scorer's features of each key, and the logits if it reads them."""
    size, cache, reads_logits = query.shape[-1], call.cache, selector.scorer.reads_logits
    caches_features = cache is not None and not reads_logits
    if cache is not None and cache.filled:
        key, value = cache.read()
    else:
        key, value, fresh = call.key(call.source, call.tables), call.view.value(call.source), None
        if not reads_logits:
            past = 0 if cache is None or cache.cross else cache.past
            fresh = selector.keys(call.source, settings, None, past, call.view.projections())
            if not caches_features:
                return key, value, fresh, None
            key = pack_features(fresh, key)
        if cache is not None:
            if caches_features:
                _check_cache(cache, key.shape[-1], selector.site)
            key, value = cache.update(key, value)
    key, columns = key[..., :size], key[..., size:]
    if reads_logits:
        logits = query @ call.repeat(key, query).transpose(-1, -2) * call.view.scale
        return key, value, logits.detach() if selector.estimator.detaches else logits, logits
    return key, value, unpack_features(columns, selector.heads), None


def _check_cache(cache: Any, width: int, site: str) -> None:
    layer = cache.store.layers[cache.layer] if cache.layer < len(cache.store.layers) else None
    keys = getattr(layer, "keys", None)
    if keys is not None and keys.numel() and keys.shape[-1] != width:
        raise HardAttentionError(
            f"the cache holds keys of width {keys.shape[-1]} at '{site}', from another model or prefix tuning; the keys of a site that "
            f"selects for each query also carry scores and have width {width}. Start from an empty cache, or use budget 1.0 there."
        )


def allowed_keys(mask: Any, queries: int, keys: int, causal: bool, device: torch.device) -> Tensor | None:
    """Return which keys each query may read, bool ``[B or 1, 1, Q, N]``; None if it may read all."""
    allowed = as_allowed(mask)
    if allowed is None and causal and queries > 1:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
    return allowed


def _attend_gathered(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    gates: Tensor | None,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attend in a decoding step, where the keys of the single query are gathered."""
    indices = selection.indices[:, :, 0].expand(key.shape[0], -1, -1)
    used = selection.slot_valid
    used = None if used is None else used.expand(key.shape[0], -1, -1, -1)
    n, total = key.shape[2], multiply_gates(None, gates)
    key, value = call.repeat(key, query), call.repeat(value, query)
    output, weights = attend_to(
        call,
        query,
        keep_heads(key, indices) if logits is None else key,
        keep_heads(value, indices),
        used,
        None if total is None else gates_at(total, indices),
        None if logits is None else keep_columns(logits, indices),
        None if call.bias is None else keep_columns(call.bias, indices),
    )
    return output, None if weights is None else spread_weights(weights, indices, n)


def attend_to(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    gates: Tensor | None,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend under a per-query mask, or weighted by gates."""
    bias = call.bias if bias is None else bias
    if gates is None:
        return call.attend_plainly(query, key, value, allowed, bias, logits)
    key, value = call.repeat(key, query), call.repeat(value, query)
    options: dict[str, Any] = dict(scale=call.view.scale, bias=bias, dropout=call.view.dropout, logits=logits)
    output, weights = gated_attend(query, key, value, gates, allowed=allowed, **options)
    return output.transpose(1, 2).flatten(2), weights if call.wants_weights else None
