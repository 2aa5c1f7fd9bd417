"""BLIP's text towers: their layers with `self` and `cross` sites."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextLayer, BlipTextSelfAttention
from transformers.pytorch_utils import apply_chunking_to_forward

from ..attention import as_bool
from ..layers import HardLayers, TowerState
from ..sites import AttentionSite, Cache, wants_weights
from ..stream import Made, as_keys, pack, unpack


class HardBlipTextSelfAttention(AttentionSite, BlipTextSelfAttention):
    """``BlipTextSelfAttention`` (self or cross) over the keys its selector keeps, through SDPA."""

    @property
    def site_scale(self) -> float:
        return self.attention_head_size**-0.5

    @property
    def site_dropout(self) -> float:
        return self.dropout.p

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

    def project_query(self, states: Tensor) -> Tensor:
        return self._split(self.query(states))

    def project_key(self, states: Tensor) -> Tensor:
        return self._split(self.key(states))

    def project_value(self, states: Tensor) -> Tensor:
        return self._split(self.value(states))

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        gates=None,
        kept=None,
        made=None,
        **kwargs,
    ):
        cross = encoder_hidden_states is not None
        cache = None
        if past_key_values is not None:
            store, filled = past_key_values, False
            if isinstance(store, EncoderDecoderCache):
                filled = cross and bool(store.is_updated.get(self.layer_idx))
                store = store.cross_attention_cache if cross else store.self_attention_cache
            past = 0 if cross else store.get_seq_length(self.layer_idx)
            cache = Cache(store, self.layer_idx, filled, past)
        output, weights = self.site_attend(
            hidden_states,
            encoder_hidden_states if cross else hidden_states,
            mask=encoder_attention_mask if cross else attention_mask,
            made=made,
            gates=gates,
            cache=cache,
            cross=cross,
            weights=wants_weights(kwargs, self.config),
            kept=(kept or {}).get(self.follows),
        )
        if cross and cache is not None and not cache.filled and isinstance(past_key_values, EncoderDecoderCache):
            past_key_values.is_updated[self.layer_idx] = True
        return output, weights


class HardBlipTextAttention(BlipTextAttention):
    """``BlipTextAttention`` that hands its keywords on."""

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, past_key_values=None, **kwargs):
        context, weights = self.self(
            hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            **kwargs,
        )
        return self.output(context, hidden_states), weights


class HardBlipTextLayer(BlipTextLayer):
    """``BlipTextLayer`` that hands its keywords to the attention, where stock drops them."""

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        encoder_attention_mask=None,
        past_key_values=None,
        key_gates=None,
        cross_gates=None,
        alive=None,
        stream=None,
        **kwargs,
    ):
        made = Made()
        output, _ = self.attention(
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            gates=key_gates,
            made=made,
            **kwargs,
        )
        if encoder_hidden_states is not None:
            reader = self.crossattention.self
            selecting = reader.active_selector() is not None or reader.follows in (kwargs.get("kept") or {})
            output, _ = self.crossattention(
                output,
                encoder_hidden_states=encoder_hidden_states,
                # stock BLIP drops this mask on the way and attends to padding; a selector never keeps padding
                encoder_attention_mask=encoder_attention_mask if selecting else alive,
                past_key_values=past_key_values,
                gates=cross_gates,
                made=made,
                **kwargs,
            )
        output = apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, output
        )
        return output if stream is None else (output, *pack(stream, made))


class HardBlipTextLayers(HardLayers):
    def run(
        self,
        layer: nn.Module,
        state: TowerState,
        index: int,
        hidden: Tensor,
        source: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        gates = self.source_gates(state)
        if index == 0:  # once for all layers
            mask, alive = as_bool(encoder_attention_mask), None
            if source is not None and self.source_slots is not None and gates is None:
                alive = as_keys((source != 0).any(-1))  # an all-zero row was dropped
                mask = alive if mask is None else mask & alive
            state.source = mask, alive
        mask, alive = state.source
        if source is not None:
            gates = self.key_gates(state, layer.crossattention.self, gates)
        hidden, *leaves = layer(
            hidden,
            source,
            attention_mask,
            mask,
            past_key_values,
            self.key_gates(state, layer.attention.self, None),
            gates,
            alive,
            kept=state.kept,
            stream=state.stream,
            **kwargs,
        )
        self.take(state, *unpack(tuple(leaves)))
        return hidden
