"""BLIP: `vision.inputs`, `vision.self.L`, `vision.tokens.L`, `text.self.L`, `text.cross.L`; the answer decoder of VQA is `answer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    BlipVisionModel,
)
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer, BlipVisionEmbeddings
from transformers.models.blip.modeling_blip_text import (
    BlipTextAttention,
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextModel,
    BlipTextSelfAttention,
)
from transformers.pytorch_utils import apply_chunking_to_forward

from ..attention import as_bool, attend
from ..layers import HardLayers, TowerState
from ..patches import replace_patches
from ..resolution import PatchSite, embed_patches, embed_positions
from ..sites import AttentionSite, Cache, wants_weights
from ..stream import Made, as_keys, pack, place, unpack
from . import Base, Example, Tower


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
        if self.input_selector is not None and self.input_selector.enabled:
            hidden_states, stream, selection = stream.select(
                self.input_selector, hidden_states, projections=projections
            )
            made.append(selection)
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
        if self.selector is not None and self.selector.enabled:
            states = hidden_states if self.selector.scorer.needs_projections else None
            output, stream, selection = stream.select(self.selector, output, states, projections)
            made.append(selection)
        return output, *pack(stream, made)


class HardBlipVisionLayers(HardLayers):
    def run(self, layer: nn.Module, state: TowerState, index: int, hidden: Tensor, **kwargs: Any) -> Tensor:
        if index == 0:
            hidden = self.begin(state, hidden)
        key_gates = self.key_gates(state, layer.self_attn, state.stream.gates)
        hidden, *leaves = layer(hidden, state.stream.gates, key_gates, kept=state.kept, stream=state.stream, **kwargs)
        self.take(state, *unpack(tuple(leaves)))
        return self.finish(state, hidden) if index == len(self) - 1 else hidden


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
        gates, mask = self.source_gates(state), as_bool(encoder_attention_mask)
        if source is not None and self.source_slots is not None and gates is None:
            if index == 0:
                state.source = as_keys((source != 0).any(-1))  # an all-zero row was dropped
            mask = state.source if mask is None else mask & state.source
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
            state.source,
            kept=state.kept,
            stream=state.stream,
            **kwargs,
        )
        self.take(state, *unpack(tuple(leaves)))
        return hidden


class Blip(Base):
    family = "transformers.models.blip."
    all_towers = ("vision", "text", "answer")
    recommended = ("vision.tokens.*",)

    @classmethod
    def towers(cls, model: nn.Module) -> dict[str, Tower]:
        towers: dict[str, Tower] = {}
        vision = model if isinstance(model, BlipVisionModel) else getattr(model, "vision_model", None)
        if isinstance(vision, BlipVisionModel):
            towers["vision"] = Tower(
                root=vision,
                layers=vision.encoder.layers,
                hard_layers=HardBlipVisionLayers,
                classes={
                    BlipAttention: HardBlipAttention,
                    BlipEncoderLayer: HardBlipEncoderLayer,
                    BlipVisionEmbeddings: HardBlipVisionEmbeddings,
                },
                kinds=("inputs", "self", "tokens"),
                attention=lambda layer, kind: layer.self_attn,
                hidden_size=vision.config.hidden_size,
                heads=vision.config.num_attention_heads,
                always="first",
                final_norm=vision.post_layernorm,
                # a class of somebody's own (of videos, say) embeds in its own way
                embeddings=vision.embeddings
                if type(vision.embeddings) in (BlipVisionEmbeddings, HardBlipVisionEmbeddings)
                else None,
                channels=3,
            )
        if isinstance(model, BlipForQuestionAnswering):
            towers["text"] = _text(model.text_encoder, "vision")
            towers["answer"] = _text(model.text_decoder.bert, "text", causal=True)
        elif isinstance(model, BlipForConditionalGeneration):
            towers["text"] = _text(model.text_decoder.bert, "vision", causal=True)
        elif isinstance(model, BlipForImageTextRetrieval):
            towers["text"] = _text(model.text_encoder, "vision")
        elif isinstance(model, BlipModel):
            towers["text"] = _text(model.text_model, None)
        elif isinstance(model, BlipTextLMHeadModel):
            towers["text"] = _text(model.bert, "vision", causal=True)
        elif isinstance(model, BlipTextModel):
            towers["text"] = _text(model, "vision")
        return towers

    @classmethod
    def labels(cls, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        labels = inputs.get("labels")
        return None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=-100)

    @classmethod
    def target_table(cls, model: nn.Module) -> Tensor | None:
        decoder = getattr(model, "text_decoder", None)
        return None if decoder is None else decoder.bert.embeddings.word_embeddings.weight

    @classmethod
    def token_loss(cls, model: nn.Module, inputs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor] | None:
        if not isinstance(model, BlipModel) or output.get("logits_per_text") is None:
            return super().token_loss(model, inputs, output)
        logits = output.logits_per_text.float()
        pairs = torch.arange(len(logits), device=logits.device)
        ways = [nn.functional.cross_entropy(x, pairs, reduction="none") for x in (logits, logits.t())]
        loss = (ways[0] + ways[1]).unsqueeze(-1) / 2
        return loss, torch.ones_like(loss, dtype=torch.bool)

    @classmethod
    def replace_inputs(
        cls, model: nn.Module, batch: dict[str, Any], dropped: dict[str, Tensor], how: str, seed: int
    ) -> dict[str, Any]:
        if "vision" not in dropped:
            return batch
        patch = getattr(model.config, "vision_config", model.config).patch_size
        return {
            **batch,
            "pixel_values": replace_patches(batch["pixel_values"], dropped["vision"], (patch, patch), how, seed),
        }

    @classmethod
    def heads(cls) -> dict[str, Callable[..., Example]]:
        return {head.__name__: lambda head=head, **config: _example(head, **config) for head in _HEADS}


def _text(bert: BlipTextModel, source: str | None, causal: bool = False) -> Tower:
    config = bert.config
    return Tower(
        root=bert,
        layers=bert.encoder.layer,
        hard_layers=HardBlipTextLayers,
        classes={
            BlipTextSelfAttention: HardBlipTextSelfAttention,
            BlipTextAttention: HardBlipTextAttention,
            BlipTextLayer: HardBlipTextLayer,
        },
        kinds=("self", "cross") if source and config.is_decoder else ("self",),
        attention=lambda layer, kind: (layer.attention if kind == "self" else layer.crossattention).self,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        always="first",
        causal=causal,
        source=source,
        source_size=config.encoder_hidden_size,
        source_always="first",
    )


_HEADS = (BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering, BlipModel)


def _example(head: type, **changes: Any) -> Example:
    text = dict(
        vocab_size=47,
        hidden_size=24,
        intermediate_size=29,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=31,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=44,
        eos_token_id=45,
        sep_token_id=45,
        pad_token_id=0,
        projection_dim=14,
    )
    vision = dict(
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        attention_dropout=0.0,
        initializer_range=0.05,
        projection_dim=14,
    )
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=14, image_text_hidden_size=13, **changes)
    ids = torch.randint(1, 44, (3, 7))
    ids[:, 0] = 44
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch: dict[str, Any] = {"pixel_values": torch.randn(3, 3, 12, 12), "input_ids": ids, "attention_mask": mask}
    if head is BlipForConditionalGeneration:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    if head is BlipForQuestionAnswering:
        batch["labels"] = torch.randint(1, 44, (3, 4))
    if head is BlipModel:
        batch["return_loss"] = True
    return Example(head(config), batch)
