"""BLIP's image tower: its layers with `inputs`, `self` and `tokens` sites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer, BlipVisionEmbeddings

from ..attention import as_bool, attend
from ..layers import HardLayers, TowerState
from ..resolution import PatchSite, embed_patches, embed_positions
from ..sites import AttentionSite, wants_weights
from ..stream import Made, pack, place, unpack


class HardBlipVisionEmbeddings(PatchSite, BlipVisionEmbeddings):
    """``BlipVisionEmbeddings`` that embeds the patches which a scorer of pixels chose, and no others."""

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        selector, patch = self.scouting(), (self.patch_size, self.patch_size)
        fits = (pixel_values.shape[-2] // patch[0]) * (pixel_values.shape[-1] // patch[1]) <= self.num_patches
        if selector is None or not interpolate_pos_encoding and not fits:  # stock says what is wrong
            return super().forward(pixel_values, interpolate_pos_encoding)
        chosen = self.choose(selector, pixel_values, patch)
        if chosen.patches is None:
            return chosen.embedded(super().forward(pixel_values, interpolate_pos_encoding))
        dtype = self.class_embedding.dtype
        rows = embed_patches(self.patch_embedding, pixel_values.to(dtype), chosen.patches, patch)
        rows = torch.cat((self.class_embedding.expand(len(rows), -1, -1), rows), 1)
        grid = chosen.grid if interpolate_pos_encoding else None
        return chosen.embedded(rows + embed_positions(self.position_embedding, chosen.patches, grid))


class HardBlipAttention(AttentionSite, BlipAttention):
    """``BlipAttention`` over the keys its selector keeps, through SDPA (stock BLIP is eager only)."""

    @property
    def site_scale(self) -> float:
        return self.scale

    @property
    def site_dropout(self) -> float:
        return self.dropout.p

    def _project(self, states: Tensor, part: int) -> Tensor:
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        if type(self.qkv) is nn.Linear:
            states = nn.functional.linear(states, self.qkv.weight[rows], self.qkv.bias[rows])
        else:  # an adapter wraps the fused projection: ask it for all three, or its part would be lost
            states = self.qkv(states)[..., rows]
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def project_query(self, states: Tensor) -> Tensor:
        return self._project(states, 0)

    def project_key(self, states: Tensor) -> Tensor:
        return self._project(states, 1)

    def project_value(self, states: Tensor) -> Tensor:
        return self._project(states, 2)

    def forward(self, hidden_states, attention_mask=None, gates=None, kept=None, made=None, packing=None, **kwargs):
        if packing is not None:
            return self.projection(self.packed_attend(hidden_states, packing)), None
        weights = wants_weights(kwargs, self.config)
        if self.active_selector() is None and self.follows is None and gates is None:
            if weights and attention_mask is None:
                return super().forward(hidden_states, **kwargs)
            query, key, value = (
                self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
            )
            output, probabilities = attend(
                query,
                key,
                value,
                scale=self.scale,
                allowed=as_bool(attention_mask),
                dropout=self.dropout.p if self.training else 0.0,
                weights=weights,
            )
            return self.projection(output.transpose(1, 2).flatten(2)), probabilities
        output, probabilities = self.site_attend(
            hidden_states,
            hidden_states,
            mask=attention_mask,
            made=made,
            gates=gates,
            weights=weights,
            kept=(kept or {}).get(self.follows),
        )
        return self.projection(output), probabilities


class HardBlipEncoderLayer(BlipEncoderLayer):
    """``BlipEncoderLayer`` that drops tokens before (``inputs``) or after (``tokens``) its computation."""

    def forward(self, hidden_states, gates=None, key_gates=None, stream=None, **kwargs):
        if stream is None:
            return super().forward(hidden_states, **kwargs)
        stream, made = replace(stream, gates=gates), Made()
        projections = self.self_attn.projections(self.layer_norm1)
        hidden_states, stream = stream.select(self.input_selector, hidden_states, made, projections)
        if made:
            key_gates = stream.gates
        packing = self.self_attn.packing(stream, key_gates, kwargs)
        output = super().forward(
            hidden_states if packing is None else packing.to_packed(hidden_states),
            attention_mask=stream.mask(None, "sdpa", hidden_states.dtype),
            gates=key_gates,
            made=made,
            packing=packing,
            **kwargs,
        )
        output = output if packing is None else packing.to_padded(output)
        place(made, stream)
        output, stream = stream.select(self.selector, output, made, projections, states=hidden_states)
        return output, *pack(stream, made)


class HardBlipVisionLayers(HardLayers):
    def run(self, layer: nn.Module, state: TowerState, index: int, hidden: Tensor, **kwargs: Any) -> Tensor:
        if index == 0:
            hidden = self.begin(state, hidden)
        if self.plain(state, layer, layer.self_attn):
            hidden = layer(hidden, attention_mask=state.stream.mask(None, "sdpa", hidden.dtype), **kwargs)
        else:
            stream, key_gates = state.stream, self.key_gates(state, layer.self_attn, state.stream.gates)
            hidden, *leaves = layer(hidden, stream.gates, key_gates, kept=state.kept, stream=stream, **kwargs)
            self.take(state, *unpack(tuple(leaves)))
        return self.finish(state, hidden) if index == len(self) - 1 else hidden
