"""ViT: `vision.inputs`, `vision.self.L`, `vision.tokens.L`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, ViTLayer

from ..layers import HardLayers, TowerState
from ..patches import replace_patches
from ..resolution import PatchSite, embed_patches, embed_positions
from ..sites import AttentionSite, wants_weights
from ..stream import Made, pack, place, unpack
from . import Base, Example, Tower


class HardViTEmbeddings(PatchSite, ViTEmbeddings):
    """``ViTEmbeddings`` that embeds the patches which a scorer of pixels chose, and no others."""

    def forward(self, pixel_values, bool_masked_pos=None, interpolate_pos_encoding=False):
        selector, size = self.scouting(), tuple(pixel_values.shape[-2:])
        if (
            selector is None or not interpolate_pos_encoding and size != tuple(self.image_size)
        ):  # stock says what is wrong
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        projection = self.patch_embeddings.projection
        patch = self.patch_embeddings.patch_size
        chosen = self.choose(selector, pixel_values, patch)
        if chosen.patches is None:
            return chosen.embedded(super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding))
        rows = embed_patches(projection, pixel_values, chosen.patches, patch)
        if bool_masked_pos is not None:
            rows = torch.where(bool_masked_pos.gather(1, chosen.patches).unsqueeze(-1), self.mask_token, rows)
        rows = torch.cat((self.cls_token.expand(len(rows), -1, -1), rows), 1)
        grid = chosen.grid if interpolate_pos_encoding else None
        return chosen.embedded(self.dropout(rows + embed_positions(self.position_embeddings, chosen.patches, grid)))


class HardViTAttention(AttentionSite, ViTAttention):
    """``ViTAttention`` over the keys its selector keeps."""

    @property
    def site_scale(self) -> float:
        return self.scaling

    @property
    def site_dropout(self) -> float:
        return self.attention_dropout

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def project_query(self, states: Tensor) -> Tensor:
        return self._split(self.q_proj(states))

    def project_key(self, states: Tensor) -> Tensor:
        return self._split(self.k_proj(states))

    def project_value(self, states: Tensor) -> Tensor:
        return self._split(self.v_proj(states))

    def forward(self, hidden_states, attention_mask=None, gates=None, kept=None, made=None, packing=None, **kwargs):
        if packing is not None:
            return self.o_proj(self.packed_attend(hidden_states, packing)), None
        if self.active_selector() is None and self.follows is None and gates is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        output, weights = self.site_attend(
            hidden_states,
            hidden_states,
            mask=attention_mask,
            made=made,
            gates=gates,
            weights=self.config._attn_implementation == "eager" and wants_weights(kwargs, self.config),
            kept=(kept or {}).get(self.follows),
        )
        return self.o_proj(output), weights


class HardViTLayer(ViTLayer):
    """``ViTLayer`` that drops tokens before (``inputs``) or after (``tokens``) its computation."""

    def forward(self, hidden_states, attention_mask=None, gates=None, key_gates=None, stream=None, **kwargs):
        if stream is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        stream, made = replace(stream, gates=gates), Made()
        projections = self.attention.projections(self.layernorm_before)
        hidden_states, stream = stream.select(self.input_selector, hidden_states, made, projections)
        if made:
            attention_mask = stream.mask(
                attention_mask, self.attention.config._attn_implementation, hidden_states.dtype
            )
            key_gates = stream.gates
        packing = self.attention.packing(stream, key_gates, kwargs)
        rows = hidden_states if packing is None else packing.to_packed(hidden_states)
        output = super().forward(rows, attention_mask, gates=key_gates, made=made, packing=packing, **kwargs)
        output = output if packing is None else packing.to_padded(output)
        place(made, stream)
        output, stream = stream.select(self.selector, output, made, projections, states=hidden_states)
        return output, *pack(stream, made)


class HardViTLayers(HardLayers):
    def run(
        self, layer: nn.Module, state: TowerState, index: int, hidden: Tensor, mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if index == 0:
            hidden = self.begin(state, hidden, mask)
        stream = state.stream
        mask = stream.mask(mask, layer.attention.config._attn_implementation, hidden.dtype)
        if self.plain(state, layer, layer.attention):
            hidden = layer(hidden, mask, **kwargs)
        else:
            key_gates = self.key_gates(state, layer.attention, stream.gates)
            hidden, *leaves = layer(hidden, mask, stream.gates, key_gates, kept=state.kept, stream=stream, **kwargs)
            self.take(state, *unpack(tuple(leaves)))
        return self.finish(state, hidden) if index == len(self) - 1 else hidden


class Vit(Base):
    family = "transformers.models.vit."
    all_towers = ("vision",)
    recommended = ("vision.tokens.*",)

    @classmethod
    def towers(cls, model: nn.Module) -> dict[str, Tower]:
        vit = model.vit if isinstance(model, (ViTForImageClassification, ViTForMaskedImageModeling)) else model
        if not isinstance(vit, ViTModel):
            return {}
        tower = Tower(
            root=vit,
            layers=vit.layers,
            hard_layers=HardViTLayers,
            classes={ViTAttention: HardViTAttention, ViTLayer: HardViTLayer, ViTEmbeddings: HardViTEmbeddings},
            kinds=("inputs", "self", "tokens"),
            attention=lambda layer, kind: layer.attention,
            hidden_size=vit.config.hidden_size,
            heads=vit.config.num_attention_heads,
            always="first",
            final_norm=vit.layernorm,
            restore=isinstance(model, ViTForMaskedImageModeling),
            embeddings=vit.embeddings,
            channels=vit.config.num_channels,
        )
        return {"vision": tower}

    @classmethod
    def target_table(cls, model: nn.Module) -> Tensor | None:
        return getattr(getattr(model, "classifier", None), "weight", None)

    @classmethod
    def token_loss(cls, model: nn.Module, inputs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor] | None:
        labels, logits = inputs.get("labels"), output.get("logits")
        if labels is None or logits is None or not labels.is_floating_point():
            return super().token_loss(model, inputs, output)
        loss = nn.functional.mse_loss if logits.shape[-1] == 1 else nn.functional.binary_cross_entropy_with_logits
        losses = loss(logits.float(), labels.view_as(logits).float(), reduction="none").mean(-1, keepdim=True)
        return losses, torch.ones_like(losses, dtype=torch.bool)

    @classmethod
    def loss_items(cls, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        labels = inputs.get("labels")
        if not isinstance(model, ViTForImageClassification) or labels is None or labels.is_floating_point():
            return None
        return (labels != -100).sum()

    @classmethod
    def replace_inputs(
        cls, model: nn.Module, batch: dict[str, Any], dropped: dict[str, Tensor], how: str, seed: int
    ) -> dict[str, Any]:
        patch = model.config.patch_size
        size = (patch, patch) if isinstance(patch, int) else tuple(patch)
        return {**batch, "pixel_values": replace_patches(batch["pixel_values"], dropped["vision"], size, how, seed)}

    @classmethod
    def heads(cls) -> dict[str, Callable[..., Example]]:
        return {head.__name__: lambda head=head, **config: _example(head, **config) for head in _HEADS}


_HEADS = (ViTForImageClassification, ViTForMaskedImageModeling, ViTModel)


def _example(head: type, **changes: Any) -> Example:
    sizes = dict(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=37,
        image_size=12,
        patch_size=4,
        num_channels=2,
        num_labels=5,
        encoder_stride=4,
        hidden_dropout_prob=0.0,
    )
    config = ViTConfig(**{**sizes, **changes})
    batch: dict[str, Any] = {"pixel_values": torch.randn(3, 2, config.image_size, config.image_size)}
    if head is ViTForImageClassification:
        batch["labels"] = torch.tensor([4, 0, 2])
    if head is ViTForMaskedImageModeling:
        batch["bool_masked_pos"] = torch.arange(9).repeat(3, 1) % 3 == 1
    return Example(head(config), batch)
