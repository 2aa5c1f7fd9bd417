"""T5's layers with their sites; the position bias follows the rows that are left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Attention, T5Block

from .. import distances
from ..attention import keep_rows
from ..layers import HardLayers, TowerState
from ..selection import mask_to_indices
from ..sites import AttentionSite, Cache, wants_weights
from ..stream import Made, Stream, mask_rows, pack, place, unpack


class HardT5Attention(AttentionSite, T5Attention):
    """``T5Attention`` over the keys its selector keeps."""

    site_scale = 1.0

    @property
    def site_dropout(self) -> float:
        return self.dropout

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.key_value_proj_dim)).transpose(1, 2)

    def project_query(self, states: Tensor) -> Tensor:
        return self._split(self.q(states))

    def project_key(self, states: Tensor) -> Tensor:
        return self._split(self.k(states))

    def project_value(self, states: Tensor) -> Tensor:
        return self._split(self.v(states))

    def forward(
        self,
        hidden_states,
        mask=None,
        key_value_states=None,
        position_bias=None,
        past_key_values=None,
        gates=None,
        cross_gates=None,
        columns=None,
        kept=None,
        made=None,
        packing=None,
        **kwargs,
    ):
        if packing is not None:
            return self.o(self.packed_attend(hidden_states, packing, position_bias)), position_bias, None
        cross = key_value_states is not None
        gates, kept = cross_gates if cross else gates, (kept or {}).get(self.follows)
        if kept is not None and columns is not None and not cross:
            kept = replace(kept, columns=columns)
        plain = self.active_selector() is None and self.follows is None and gates is None
        plain = plain and not distances.is_table(position_bias)
        cache = None if plain and not cross else self._cache(past_key_values, cross)
        if plain:
            if cache is not None and not cache.filled:
                cache.lay_out(key_value_states.shape[1])
            return super().forward(hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs)
        past = 0 if cache is None else cache.past
        if position_bias is None and self.has_relative_attention_bias:
            queries = hidden_states.shape[1]
            keys = mask.shape[-1] if mask is not None else queries + past
            position_bias = self.compute_bias(queries, keys, device=hidden_states.device, past_seen_tokens=past)
        output, weights = self.site_attend(
            hidden_states,
            key_value_states if cross else hidden_states,
            mask=mask,
            made=made,
            gates=gates,
            bias=None if cross else position_bias,
            cache=cache,
            cross=cross,
            weights=self.config._attn_implementation == "eager" and wants_weights(kwargs, self.config),
            kept=kept,
        )
        if cross and cache is not None and not cache.filled and isinstance(past_key_values, EncoderDecoderCache):
            past_key_values.is_updated[self.layer_idx] = True
        return self.o(output), position_bias, weights

    def _cache(self, past_key_values: Any, cross: bool) -> Cache | None:
        if past_key_values is None:
            return None
        past = past_key_values.get_seq_length(self.layer_idx)
        past = past.clone() if isinstance(past, Tensor) else past
        if not isinstance(past_key_values, EncoderDecoderCache):
            return Cache(past_key_values, self.layer_idx, past=past)
        if not cross:
            return Cache(past_key_values.self_attention_cache, self.layer_idx, past=past)
        filled = bool(past_key_values.is_updated.get(self.layer_idx))
        return Cache(past_key_values.cross_attention_cache, self.layer_idx, filled=filled)


class HardT5Block(T5Block):
    """``T5Block`` that drops tokens before (``inputs``) or after (``tokens``) its computation."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        encoder_decoder_position_bias=None,
        gates=None,
        key_gates=None,
        cross_gates=None,
        columns=None,
        stream=None,
        **kwargs,
    ):
        cross = (encoder_hidden_states, encoder_attention_mask, encoder_decoder_position_bias)
        if stream is None:
            return super().forward(hidden_states, attention_mask, position_bias, *cross, **kwargs)
        stream, made = replace(stream, gates=gates), Made()
        attention = self.layer[0].SelfAttention
        projections = attention.projections(self.layer[0].layer_norm)
        before = stream.positions
        hidden_states, stream = stream.select(self.input_selector, hidden_states, made, projections)
        position_bias = left(position_bias, stream, before, made)
        if made:
            attention_mask = stream.mask(attention_mask, attention.config._attn_implementation, hidden_states.dtype)
            key_gates = stream.gates
        packing = attention.packing(stream, key_gates, kwargs)
        output, position_bias, cross_bias = super().forward(
            hidden_states if packing is None else packing.to_packed(hidden_states),
            attention_mask,
            position_bias,
            *cross,
            gates=key_gates,
            cross_gates=cross_gates,
            columns=columns,
            made=made,
            packing=packing,
            **kwargs,
        )
        output = output if packing is None else packing.to_padded(output)
        place(made, stream)
        before = stream.positions
        output, stream = stream.select(self.selector, output, made, projections, states=hidden_states)
        position_bias = left(position_bias, stream, before, made)
        return output, position_bias, cross_bias, *pack(stream, made)


class HardT5Layers(HardLayers):
    def run(
        self,
        layer: nn.Module,
        state: TowerState,
        index: int,
        hidden: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
        source_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        attention = layer.layer[0].SelfAttention
        implementation = attention.config._attn_implementation
        if index == 0:
            state.length = hidden.shape[1]
            if not attention.is_causal:
                state.stream = Stream(valid=mask_rows(mask, hidden.shape[0]))
                bias = distance_table(attention, hidden.shape[1])
        key_gates = self.key_gates(state, attention, state.stream.gates)
        cross_gates = self.source_gates(state)
        if source is not None and self.source_slots is not None and cross_gates is None:
            if index == 0:
                state.source = self.surviving(source, source_mask, attention, kwargs.get("past_key_values"))
            source, source_mask = state.source
        if source is not None:
            cross_gates = self.key_gates(state, layer.layer[1].EncDecAttention, cross_gates)
        stream = state.stream
        mask = stream.mask(mask, implementation, hidden.dtype)
        if bias is not None and distances.is_table(bias):
            selector, plain = attention.active_selector(), implementation == "sdpa" and key_gates is None
            masked = selector is not None and (selector.masked or not selector.once)
            if masked or not plain or mask is not None and not attention.follows and selector is None:
                bias = distances.matrix(bias)  # once, for every layer from here on
        kept = state.kept.get(attention.follows)
        hidden, bias, source_bias, *leaves = layer(
            hidden,
            mask,
            bias,
            source,
            source_mask,
            source_bias,
            stream.gates,
            key_gates,
            cross_gates,
            None if kept is None else kept.columns,
            kept=state.kept,
            stream=stream,
            **kwargs,
        )
        self.take(state, *unpack(tuple(leaves)))
        if index == 0 and bias is not None:
            bias = bias.contiguous()  # stock hands on a permuted view, which every later layer copies
        return (self.finish(state, hidden) if index == len(self) - 1 else hidden), bias, source_bias

    def surviving(
        self, source: Tensor, mask: Tensor | None, attention: nn.Module, past_key_values: Any
    ) -> tuple[Tensor, Tensor]:
        """The encoder's rows that hold something (an all-zero row was dropped), and their mask."""
        alive = (source != 0).any(-1)
        if mask is not None:
            alive = alive & mask_rows(mask, source.shape[0])
        slots = self.source_slots(alive)
        used = torch.arange(slots, device=source.device) < alive.sum(-1, keepdim=True)
        cached = isinstance(past_key_values, EncoderDecoderCache) and past_key_values.is_updated.get(
            attention.layer_idx
        )
        if not cached:  # later steps read the cache, which holds the surviving rows only
            source = keep_rows(source, mask_to_indices(alive, slots))
        return source, Stream(valid=used, slots=slots).mask(None, attention.config._attn_implementation, source.dtype)


def distance_table(attention: T5Attention, length: int) -> Tensor:
    """T5's position bias as a table of distances, ``[H, 2 * length - 1]``."""
    weight = attention.relative_attention_bias.weight
    bucket = attention._relative_position_bucket(
        torch.arange(1 - length, length, device=weight.device),
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(bucket).t().contiguous()


def left(bias: Tensor | None, stream: Stream, before: Tensor | None, made: Made) -> Tensor | None:
    """The bias between the rows that the last selection left; ``before``: their positions until then."""
    if bias is None or stream.positions is before:  # dropped nothing, or runs masked
        return bias
    indices = made[-1].indices[:, 0, 0].expand(len(stream.positions), -1)
    return distances.pairs(bias, indices) if distances.is_table(bias) else keep_pairs(bias, indices)


def keep_pairs(bias: Tensor, indices: Tensor) -> Tensor:
    """Gather queries and keys of a bias: ``[B or 1, H, N, N]`` by int64 ``[B, K]`` to ``[B, H, K, K]``, contiguous."""
    n, heads = bias.shape[-1], bias.shape[1]
    pairs = (indices[:, :, None] * n + indices[:, None, :]).flatten(1)
    if bias.shape[0] == 1:
        kept = bias.reshape(heads, n * n).index_select(1, pairs.flatten()).view(heads, len(indices), -1).transpose(0, 1)
    else:
        kept = bias.reshape(len(bias), heads, n * n).gather(2, pairs[:, None].expand(-1, heads, -1))
    return kept.reshape(len(indices), heads, *2 * (indices.shape[1],)).contiguous()
