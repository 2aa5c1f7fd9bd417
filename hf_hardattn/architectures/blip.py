"""BLIP: `vision.inputs`, `vision.self.L`, `vision.tokens.L`, `text.self.L`, `text.cross.L`; the answer decoder of VQA is `answer`."""

from __future__ import annotations

from collections.abc import Callable
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
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer, BlipVisionEmbeddings
from transformers.models.blip.modeling_blip_text import (
    BlipTextAttention,
    BlipTextLayer,
    BlipTextLMHeadModel,
    BlipTextModel,
    BlipTextSelfAttention,
)

from ..patches import replace_patches
from . import Base, Example, Tower
from ._blip_text import HardBlipTextAttention, HardBlipTextLayer, HardBlipTextLayers, HardBlipTextSelfAttention
from ._blip_vision import HardBlipAttention, HardBlipEncoderLayer, HardBlipVisionEmbeddings, HardBlipVisionLayers


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
