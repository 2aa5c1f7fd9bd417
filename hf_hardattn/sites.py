"""Where selection meets a Transformer: the attention of a ``self`` or ``cross`` site, and the layers of a tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import as_bool, attend, gated_attend, keep_columns, keep_heads, keep_rows
from .scorers import Projections
from .selection import Selection
from .selector import Selector
from .stream import Pass, Stream, as_keys, required_rows

PASS = "hard_attention_pass"  # keyword that carries the Pass from the model's hook to the towers


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


class AttentionSite:
    """Mixin of every Hard attention class. The class gives its projections; ``site_attend`` does the rest.

    A selection is made once per row, before the key and value projections, unless it must differ between queries:
    scorers with ``per_query``, and causal attention, where a query may choose among its past only.
    """

    selector: Selector | None
    site_scale: float
    site_dropout: float
    training: bool

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

    def site_attend(
        self,
        hidden: Tensor,
        source: Tensor,
        *,
        mask: Tensor | None,
        made: list[Selection] | None,
        gates: Tensor | None = None,
        bias: Tensor | None = None,
        cache: Cache | None = None,
        cross: bool = False,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Select among the keys, then attend to what was kept.

        Args:
            hidden: queries' states ``[B, Q, D]``. source: keys' states ``[B, N, D]``.
            mask: of Transformers, ``[B, 1, Q or 1, N]`` bool or additive, or None.
            made: list that takes the selection.
            gates: ``[B, N]`` of dropped keys, from masked training upstream.
            bias: ``[1 or B, H, Q, N]`` added to the logits.
            cache: scores that later steps need are cached as extra columns of the keys, so that beam search reorders them too.

        Returns:
            output ``[B, Q, H * d]``; attention weights ``[B, H, Q, N]`` when asked for.
        """
        query, selector = self.project_query(hidden), self.active_selector()
        size, allowed = query.shape[-1], as_bool(mask)
        filled = cache is not None and cache.filled
        if selector is not None and selector.once and not filled:
            return self._attend_once(
                query, source, selector, allowed, made, gates, bias, cache if cross else None, weights
            )
        fresh, cached = None, cache is not None and not (selector is not None and selector.keeps_all)
        if cache is not None and cache.filled:
            key, value = cache.read()
        else:
            key, value = self.project_key(source), self.project_value(source)
            if selector is not None:
                past = 0 if cache is None or cross else cache.past
                fresh = selector.keys(source, None, past, self.projections())
                if cached:
                    key = torch.cat((key, fresh.to(key.dtype).expand(-1, key.shape[1], -1, -1)), -1)
            if cache is not None:
                key, value = cache.update(key, value)
        key, features = key[..., :size], key[..., size:]
        if selector is None:
            return self._output(query, key, value, allowed, as_keys(gates), bias, weights)
        if selector.once:  # kept keys of an earlier step; the extra column marks the slots in use
            # a static cache has more places than slots; only the marks tell them apart
            static = cache is not None and cache.store.is_compileable
            dense = mask is None and not selector.data_dependent and not selector.masked and not static
            return self._output(
                query, key, value, None if dense else features[..., 0].unsqueeze(2) > 0.5, None, None, weights
            )
        if cached:
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
        if made is not None:
            made.append(selection)
        if query.shape[2] == 1 and not selector.masked:  # decoding: one query, gather its keys
            indices = selection.indices[:, :, 0].expand(key.shape[0], -1, -1)
            used = None if selection.dense else selection.slot_mask.expand(key.shape[0], -1, -1, -1)
            output, probabilities = self._output(
                query,
                keep_heads(key, indices),
                keep_heads(value, indices),
                used,
                _pick(gates, indices),
                None if bias is None else keep_columns(bias, indices),
                weights,
            )
            return output, _spread(probabilities, indices, key.shape[2])
        used = allowed if selection.gates is not None else selection.mask
        return self._output(query, key, value, used, _product(selection.gates, gates), bias, weights)

    def _attend_once(
        self,
        query: Tensor,
        source: Tensor,
        selector: Selector,
        allowed: Tensor | None,
        made: list[Selection] | None,
        gates: Tensor | None,
        bias: Tensor | None,
        cache: Cache | None,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batch, n = source.shape[:2]
        valid = None if allowed is None else allowed[:, 0, 0].expand(batch, -1)
        if gates is not None:
            present = gates.detach() > 0
            valid = present if valid is None else valid & present
        features = selector.keys(source, valid, projections=self.projections())
        required = required_rows(selector.always, (batch, n), valid, source.device)
        selection = selector(features, as_keys(valid), as_keys(required), context=selector.context(source, valid))
        if made is not None:
            made.append(selection)
        if selector.masked or selection.slots >= n:
            key, value = self.project_key(source), self.project_value(source)
            total = _product(selection.gates, gates)
            used = as_keys(valid) if selection.gates is not None else selection.mask
            if selection.gates is None and selection.dense and selection.slots >= n:
                used = None
            indices = None
        else:
            indices = selection.indices[:, :, 0].expand(batch, -1, -1)
            if indices.shape[1] == 1:
                kept = keep_rows(source, indices[:, 0])
                key, value = self.project_key(kept), self.project_value(kept)
            else:
                key, value = (
                    keep_heads(self.project_key(source), indices),
                    keep_heads(self.project_value(source), indices),
                )
            used = None if selection.dense else selection.slot_mask
            total = _pick(gates, indices)
            bias = None if bias is None else keep_columns(bias, indices)
        if cache is not None:
            marks = (
                torch.ones((), dtype=key.dtype, device=key.device)
                if used is None
                else used[:, :, 0, :, None].to(key.dtype)
            )
            cache.update(torch.cat((key, marks.expand(batch, key.shape[1], key.shape[2], 1)), -1), value)
        output, probabilities = self._output(query, key, value, used, total, bias, weights)
        return output, probabilities if indices is None else _spread(probabilities, indices, n)

    def _output(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None,
        gates: Tensor | None,
        bias: Tensor | None,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.site_dropout if self.training else 0.0
        if gates is not None:
            output, spread = gated_attend(
                query, key, value, gates, scale=self.site_scale, allowed=allowed, bias=bias, dropout=dropout
            )
            return output.transpose(1, 2).flatten(2), spread if weights else None
        output, probabilities = attend(
            query, key, value, scale=self.site_scale, allowed=allowed, bias=bias, dropout=dropout, weights=weights
        )
        return output.transpose(1, 2).flatten(2), probabilities if weights else None


def _product(chosen: Tensor | None, upstream: Tensor | None) -> Tensor | None:
    """Gates of this site ``[B, H, Q, N]`` times those from upstream ``[B, N]``; None stands for all ones."""
    if chosen is None or upstream is None:
        return as_keys(upstream) if chosen is None else chosen
    return chosen * as_keys(upstream)


def _pick(upstream: Tensor | None, indices: Tensor) -> Tensor | None:
    """Upstream gates ``[B, N]`` at the kept positions ``[B, H, K]``, as ``[B, H, 1, K]``."""
    if upstream is None:
        return None
    return as_keys(upstream).expand(-1, indices.shape[1], 1, -1).gather(-1, indices.unsqueeze(2))


def _spread(probabilities: Tensor | None, indices: Tensor, n: int) -> Tensor | None:
    """Attention weights over the kept slots ``[B, H, Q, K]`` to all keys ``[B, H, Q, n]``, zero where nothing was kept."""
    if probabilities is None:
        return None
    columns = indices.unsqueeze(2).expand(-1, probabilities.shape[1], probabilities.shape[2], -1)
    return probabilities.new_zeros(*probabilities.shape[:3], n).scatter(-1, columns, probabilities)


def wants_weights(kwargs: dict[str, Any], config: Any) -> bool:
    """Whether the caller asked for attention weights."""
    return bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False)))


@dataclass
class TowerState:
    """What one iteration over a tower's layers carries from layer to layer."""

    stream: Stream
    record: Pass | None = None
    length: int = 0
    source: Any = None


class Turn:
    """A layer as its tower's loop sees it: called, it also carries the stream; in all else it is the layer."""

    def __init__(self, layers: HardLayers, layer: nn.Module, state: TowerState, index: int):
        self._layers, self._layer, self._state, self._index = layers, layer, state, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self._state
        if self._index == 0:
            state.record = kwargs.get(PASS)
        kwargs.pop(PASS, None)
        return self._layers.run(self._layer, state, self._index, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class HardLayers(nn.ModuleList):
    """A tower's list of layers. Iterating over it starts one pass: the stream lives in the iteration, not on the model.

    Transformers' own forward loop runs unchanged; each architecture says in ``run`` how its layers take their arguments.

    Attributes:
        tower: its name. restore: whether the output takes its full length again. source: tower that cross-attention reads.
        source_slots: maps the length of ``source`` to the bound of its surviving rows; None when it drops none.
    """

    tower: str
    restore: bool
    source: str | None
    source_slots: Callable[[int], int] | None

    def __iter__(self) -> Iterator[Any]:
        state = TowerState(Stream())
        for index, layer in enumerate(super().__iter__()):
            yield Turn(self, layer, state, index)

    def run(self, layer: nn.Module, state: TowerState, index: int, *args: Any, **kwargs: Any) -> Any:
        """Call ``layer`` with the stream's arguments, take the stream it returns, and finish after the last layer."""
        raise NotImplementedError

    def take(self, state: TowerState, stream: Stream, selections: list[Selection]) -> None:
        """Note what a layer selected."""
        state.stream = stream
        if state.record is not None:
            state.record.selections.extend(selections)

    def source_gates(self, state: TowerState) -> Tensor | None:
        """Gates of the rows that cross-attention reads, ``[B, N]``, in masked training; else None."""
        return None if state.record is None or self.source is None else state.record.gates.get(self.source)

    def finish(self, state: TowerState, hidden: Tensor) -> Tensor:
        """The tower's output."""
        gates, record = state.stream.gates, state.record
        shared = record is not None and record.shares_gates
        if gates is not None and record is not None:
            record.gates[self.tower] = gates
        return state.stream.finish(hidden, state.length, self.restore, keep_gated=shared)


class HardLayerNorm(nn.LayerNorm):
    """LayerNorm that leaves all-zero rows zero: they mean that nothing was computed there, and must go on meaning it."""

    def forward(self, input: Tensor) -> Tensor:
        empty = (input == 0).all(-1, keepdim=True)
        # without variance the backward divides by sqrt(eps), which fp16 cannot hold: norm a ramp there instead
        ramp = torch.linspace(-1.0, 1.0, input.shape[-1], dtype=input.dtype, device=input.device)
        return super().forward(torch.where(empty, ramp, input)).masked_fill(empty, 0.0)
