"""Where selection meets a Transformer: the attention of a ``self`` or ``cross`` site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import (
    as_bool,
    attend,
    attend_by_parts,
    attend_packed,
    fits,
    gated_attend,
    keep_columns,
    keep_heads,
    keep_rows,
)
from .glimpses import before
from .kept import Kept, pick, product, spread
from .packing import Packing
from .scorers import Projections
from .selector import Selector
from .stream import Made, Stream, as_keys, required_rows


@dataclass
class Cache:
    """One layer of a Transformers cache, as attention modules use it.

    Attributes:
        store: a Transformers ``Cache``. layer: index in it.
        filled: cross-attention keys are there already.
        past: positions cached before this call.
    """

    store: Any
    layer: int
    filled: bool = False
    past: int | Tensor = 0

    def read(self) -> tuple[Tensor, Tensor]:
        return self.store.layers[self.layer].keys, self.store.layers[self.layer].values

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.store.update(key, value, self.layer)

    def fill(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take all keys that a cross-attention will have."""
        self.lay_out(key.shape[2])
        return self.update(key, value)

    def lay_out(self, keys: int) -> None:
        """Give a static layer of a cross-attention as many places as keys are left, not one for every row of the source."""
        layer = self.store.layers[self.layer] if self.store.is_compileable else None
        if layer is not None and layer.max_cache_len != keys:
            layer.max_cache_len, layer.is_initialized = keys, False  # the next update makes its tensors


class AttentionSite:
    """Mixin of every Hard attention class. The class gives its projections; ``site_attend`` does the rest.

    A selection is made once per row, before the key and value projections, unless it must differ between queries:
    scorers with ``per_query``, and causal attention, where a query may choose among its past only.

    Attributes:
        follows: site of an earlier layer whose choice this one shares; None when it has its own, or none.
    """

    selector: Selector | None
    follows: str | None
    site_scale: float
    site_dropout: float
    training: bool
    config: Any

    def project_query(self, states: Tensor) -> Tensor:
        """``[B, Q, D]`` to ``[B, H, Q, d]``."""
        raise NotImplementedError

    def project_key(self, states: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, H, N, d]``."""
        raise NotImplementedError

    def project_value(self, states: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, H, N, d]``."""
        raise NotImplementedError

    def active_selector(self) -> Selector | None:
        return self.selector if self.selector is not None and self.selector.enabled else None

    def projections(self, norm: Any = None) -> Projections:
        """The projections as a scorer reads them, behind the layer's norm for scorers of the residual stream."""
        before = norm if norm is not None else (lambda states: states)
        return Projections(
            query=lambda states: self.project_query(before(states)) * self.site_scale,
            key=lambda states: self.project_key(before(states)),
        )

    def packing(self, stream: Stream, gates: Tensor | None, kwargs: dict[str, Any]) -> Packing | None:
        """How the rows of this layer are packed; None where its attention chooses among them, weighs them, or tells its weights: all
        three read padded rows."""
        busy = self.active_selector() is not None or self.follows is not None or gates is not None
        return None if busy or wants_weights(kwargs, self.config) else stream.packing

    def packed_attend(self, hidden: Tensor, packing: Packing, bias: Tensor | None = None) -> Tensor:
        """Attend within each row of packed states ``[1, T, D]``; output ``[1, T, H * d]``."""
        query, key, value = self.project_query(hidden), self.project_key(hidden), self.project_value(hidden)
        dropout = self.site_dropout if self.training else 0.0
        return attend_packed(query, key, value, packing, scale=self.site_scale, bias=bias, dropout=dropout)

    def site_attend(
        self,
        hidden: Tensor,
        source: Tensor,
        *,
        mask: Tensor | None,
        made: Made | None,
        gates: Tensor | None = None,
        bias: Tensor | None = None,
        cache: Cache | None = None,
        cross: bool = False,
        weights: bool = False,
        kept: Kept | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Select among the keys, then attend to what was kept.

        Args:
            hidden: queries' states ``[B, Q, D]``. source: keys' states ``[B, N, D]``.
            mask: of Transformers, ``[B, 1, Q or 1, N]`` bool or additive, or None.
            made: list that takes the selection.
            gates: ``[B, N]`` of dropped keys, from masked training upstream; with ``kept``, its gates are in them.
            bias: ``[1 or B, H, Q, N]`` or a table of distances, added to the logits.
            cache: scores that later steps need are cached as extra columns of the keys, so that beam search reorders them too.
            kept: what an earlier layer chose, where this one follows it.

        Returns:
            output ``[B, Q, H * d]``; attention weights ``[B, H, Q, N]`` when asked for.
        """
        query, selector = self.project_query(hidden), self.active_selector()
        size, filled = query.shape[-1], cache is not None and cache.filled
        settled = filled and (self.follows is not None or selector is not None and selector.once)
        plain = selector is None and gates is None and bias is None and mask is not None and mask.dtype == query.dtype
        allowed = None if settled or plain else as_bool(mask)
        if selector is not None and selector.once and not filled:
            kept = self._choose(source, selector, allowed, made, gates, bias)
            gates = product(kept.gates, gates)
        if kept is not None and not filled:
            return self._attend_kept(query, source, kept, gates, bias, cache if cross else None, weights)
        logits = fresh = None
        reads_logits = selector is not None and selector.scorer.reads_logits
        cached = cache is not None and not (selector is not None and selector.keeps_all) and not reads_logits
        if cache is not None and cache.filled:
            key, value = cache.read()
        else:
            key, value = self.project_key(source), self.project_value(source)
            if selector is not None and not reads_logits:
                past = 0 if cache is None or cross else cache.past
                fresh = selector.keys(source, None, past, self.projections())
                if cached:
                    key = torch.cat((key, fresh.to(key.dtype).expand(-1, key.shape[1], -1, -1)), -1)
            if cache is not None:
                key, value = cache.fill(key, value) if cross else cache.update(key, value)
        key, features = key[..., :size], key[..., size:]
        if settled:
            # kept keys of an earlier step; an extra column marks the slots in use, where not all are: as a bias, which needs no mask made
            if features.shape[-1]:
                unused = (features[..., 0].unsqueeze(2) - 1) * torch.finfo(key.dtype).max
                return self._output(query, key, value, None, None, unused, weights)
            used = as_bool(mask) if mask is not None and mask.shape[-1] == key.shape[2] else None
            return self._output(query, key, value, used, None, None, weights)
        if plain:  # an additive mask, as the kernel takes it
            return self._output(query, key, value, None, None, mask, weights)
        if selector is None:
            return self._output(query, key, value, allowed, as_keys(gates), bias, weights)
        if reads_logits:
            logits = query @ key.transpose(-1, -2) * self.site_scale
            features = logits.detach() if selector.estimator.detaches else logits
        elif cached:
            features = features[:, : selector.heads].float()
        elif fresh is not None and fresh.shape[2] == key.shape[2]:
            features = fresh
        else:  # earlier steps cached no scores, since nothing can be dropped: the cache keeps its stock shape
            features = key.new_zeros(key.shape[0], selector.heads, key.shape[2], selector.scorer.features).float()
        if allowed is None and selector.causal and query.shape[2] > 1:
            n = key.shape[2]
            allowed = torch.ones(query.shape[2], n, dtype=torch.bool, device=key.device).tril(n - query.shape[2])[
                None, None
            ]
        valid = allowed
        if gates is not None:
            valid = as_keys(gates.detach() > 0) if valid is None else valid & as_keys(gates.detach() > 0)
        context = None if filled else selector.context(source)
        selection = selector(features, valid, None, queries=hidden, context=context)
        if selector.scorer.monotonic and cache is not None:  # the next step reads on from here, in its own beam
            cache.read()[0][:, : selector.heads, :, -1] += before(selection.mask[:, :, -1]).to(key.dtype)
        if made is not None:
            made.append(selection)
        if query.shape[2] == 1 and not selector.masked:  # decoding: one query, gather its keys
            indices = selection.indices[:, :, 0].expand(key.shape[0], -1, -1)
            used = None if selection.dense else selection.slot_mask.expand(key.shape[0], -1, -1, -1)
            output, probabilities = self._output(
                query,
                keep_heads(key, indices) if logits is None else key,
                keep_heads(value, indices),
                used,
                pick(gates, indices),
                None if bias is None else keep_columns(bias, indices),
                weights,
                None if logits is None else keep_columns(logits, indices),
            )
            return output, spread(probabilities, indices, key.shape[2])
        used = allowed if selection.gates is not None else selection.mask
        return self._output(query, key, value, used, product(selection.gates, gates), bias, weights, logits)

    def _choose(
        self,
        source: Tensor,
        selector: Selector,
        allowed: Tensor | None,
        made: Made | None,
        gates: Tensor | None,
        bias: Tensor | None,
    ) -> Kept:
        """Choose once for all queries of a row."""
        batch, n = source.shape[:2]
        valid = None if allowed is None else allowed[:, 0, 0].expand(batch, -1)
        if gates is not None:
            present = gates.detach() > 0
            valid = present if valid is None else valid & present
        features = selector.keys(source, valid, projections=self.projections())
        required = required_rows(selector.always, (batch, n), valid, source.device)
        selection = selector(features, as_keys(valid), as_keys(required), context=selector.context(source, valid))
        kept = Kept.of(selection)
        if kept.indices is not None and bias is not None and fits(bias, kept.indices):
            kept.columns = kept.bias(bias)
        if made is not None:
            made.append(selection)
            made.columns = kept.columns if selector.config.share_selection else None
        return kept

    def _attend_kept(
        self,
        query: Tensor,
        source: Tensor,
        kept: Kept,
        gates: Tensor | None,
        bias: Tensor | None,
        cache: Cache | None,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to what a choice kept; ``gates`` are the choice's and those from upstream together."""
        n, used, indices = source.shape[1], kept.used, kept.indices
        packing = kept.packing if gates is None and not weights else None
        if packing is not None and indices is not None and used is not None:
            states = packing.to_packed(keep_rows(source, indices[:, 0]))
            key, value = self.project_key(states), self.project_value(states)
            if cache is not None:
                cache.fill(_marked(packing.heads_to_padded(key), used), packing.heads_to_padded(value))
            options: dict[str, Any] = dict(scale=self.site_scale, dropout=self.site_dropout if self.training else 0.0)
            return attend_packed(query, key, value, packing, bias=kept.bias(bias), **options), None
        if indices is None:
            key, value, total = self.project_key(source), self.project_value(source), gates
        else:
            if indices.shape[1] == 1:
                source = keep_rows(source, indices[:, 0])
                key, value = self.project_key(source), self.project_value(source)
            else:
                key = keep_heads(self.project_key(source), indices)
                value = keep_heads(self.project_value(source), indices)
            total = pick(gates, indices)
        if cache is not None:
            cache.fill(key if used is None else _marked(key, used), value)
        fused = total is None and not weights
        if fused and bias is not None and indices is not None and kept.columns is None:  # its columns did not fit
            options = dict(scale=self.site_scale, dropout=self.site_dropout if self.training else 0.0)
            output = attend_by_parts(query, key, value, indices, bias, allowed=used, **options)
            return output.transpose(1, 2).flatten(2), None
        output, probabilities = self._output(query, key, value, used, as_keys(total), kept.bias(bias), weights)
        return output, probabilities if indices is None else spread(probabilities, indices, n)

    def _output(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None,
        gates: Tensor | None,
        bias: Tensor | None,
        weights: bool,
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.site_dropout if self.training else 0.0
        options: dict[str, Any] = dict(scale=self.site_scale, bias=bias, dropout=dropout, logits=logits)
        if gates is not None:
            output, spread = gated_attend(query, key, value, gates, allowed=allowed, **options)
            return output.transpose(1, 2).flatten(2), spread if weights else None
        output, probabilities = attend(query, key, value, allowed=allowed, weights=weights, **options)
        return output.transpose(1, 2).flatten(2), probabilities if weights else None


def _marked(key: Tensor, used: Tensor) -> Tensor:
    """Keys ``[B, H, K, d]`` with one more column: 1 where the slot is in use."""
    return torch.cat((key, used[:, :, 0, :, None].to(key.dtype).expand(*key.shape[:3], 1)), -1)


def wants_weights(kwargs: dict[str, Any], config: Any) -> bool:
    """Whether the caller asked for attention weights."""
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))
