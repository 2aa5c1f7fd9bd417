"""A tiny model and a batch for every head of every family: odd, distinct sizes, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipModel,
)

from hf_hardattn import models
from hf_hardattn.backbones.gru import GruConfig, GruForConditionalGeneration


@dataclass
class Example:
    """A tiny model and a batch for it."""

    model: nn.Module
    batch: dict[str, Any] = field(default_factory=dict)


def build(family: str, head: str, **changes: Any) -> Example:
    """The example of a head, with changes to its configuration."""
    if family == "gru":
        return gru_example(**changes)
    cls = getattr(transformers, head)
    if family in ODD:
        return ODD[family](cls, **changes)
    spec = models.load(family).spec
    if head.removesuffix("WithProjection").endswith("TextModel") or head in ("CLIPModel", "SiglipModel"):
        return dual_example(cls, **changes)
    if family == "siglip2":
        return siglip2_example(cls, **changes)
    images = spec.towers[0].name == "vision"
    sizes = {**(IMAGE_SIZES if images else TEXT_SIZES), **spec.tiny, **changes}
    return image_example(cls, sizes) if images else text_example(cls, sizes)


IMAGE_SIZES: dict[str, Any] = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=37,
    image_size=12,
    patch_size=4,
    num_channels=2,
    num_labels=5,
    hidden_dropout_prob=0.0,
)
TEXT_SIZES: dict[str, Any] = dict(
    vocab_size=53,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=37,
    max_position_embeddings=40,
    num_labels=5,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    pad_token_id=0,
)


def image_example(cls: Any, sizes: dict[str, Any]) -> Example:
    """An image model on three images of 3 x 3 patches."""
    config = cls.config_class(**sizes)
    if hasattr(config, "vision_config"):
        labels = {"num_labels": sizes["num_labels"]}
        config = cls.config_class(vision_config=sizes, text_config=TEXT_SIZES, **labels)
    vision = getattr(config, "vision_config", config)
    batch: dict[str, Any] = {"pixel_values": torch.randn(3, vision.num_channels, vision.image_size, vision.image_size)}
    if cls.__name__.endswith("ForImageClassification"):
        batch["labels"] = torch.tensor([4, 0, 2])
    if cls.__name__.endswith("ForMaskedImageModeling"):
        batch["bool_masked_pos"] = torch.arange(9).repeat(3, 1) % 3 == 1
    return Example(cls(config), batch)


def dual_example(cls: Any, **changes: Any) -> Example:
    """A text tower that stands beside an image tower, or both; CLIP's texts have a mask, SigLIP's none."""
    texts = {**TEXT_SIZES, "eos_token_id": 52, "bos_token_id": 2, "projection_dim": 14, **changes}
    ids, mask = padded_ids()
    batch: dict[str, Any] = {"input_ids": ids}
    if cls.__name__.startswith("CLIP"):
        ids[torch.arange(3), mask.sum(1) - 1] = 52
        batch["attention_mask"] = mask
    else:
        texts["projection_size"] = 24
    if not hasattr(cls.config_class(), "vision_config"):
        return Example(cls(cls.config_class(**texts)), batch)
    images = {**IMAGE_SIZES, "projection_dim": 14}
    batch["pixel_values"] = torch.randn(3, 2, 12, 12)
    batch["return_loss"] = True
    return Example(cls(cls.config_class(vision_config=images, text_config=texts, projection_dim=14)), batch)


def siglip2_example(cls: Any, **changes: Any) -> Example:
    """SigLIP 2 on images of 3 x 3, 2 x 3 and 2 x 4 patches."""
    images = {**IMAGE_SIZES, "num_patches": 9, **changes}
    texts = {**TEXT_SIZES, "projection_size": 24}
    whole = hasattr(cls.config_class(), "vision_config")
    config = cls.config_class(vision_config=images, text_config=texts) if whole else cls.config_class(**images)
    batch: dict[str, Any] = {
        "pixel_values": torch.randn(3, 9, 2 * 4 * 4),
        "pixel_attention_mask": torch.arange(9)[None] < torch.tensor([[9], [6], [8]]),
        "spatial_shapes": torch.tensor([[3, 3], [2, 3], [2, 4]]),
    }
    if cls.__name__ == "Siglip2Model":
        batch |= {"input_ids": torch.randint(2, 53, (3, 11)), "return_loss": True}
    return Example(cls(config), batch)


def text_example(cls: Any, sizes: dict[str, Any]) -> Example:
    """A text encoder on three rows of different length."""
    ids, mask = padded_ids()
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if cls.__name__.endswith("ForSequenceClassification"):
        batch["labels"] = torch.tensor([3, 0, 4])
    return Example(cls(cls.config_class(**sizes)), batch)


def padded_ids() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[3, 11]`` of rows of 11, 7 and 9 tokens, and their mask."""
    ids = torch.randint(2, 53, (3, 11))
    mask = torch.ones_like(ids)
    for row, length in ((0, 11), (1, 7), (2, 9)):
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 1, 0, 0
    return ids, mask


def t5_example(head: type, **changes: Any) -> Example:
    """T5, or one of its successors."""
    name = head.__name__
    sizes = dict(
        vocab_size=53,
        d_model=26,
        d_kv=6,
        d_ff=39,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=10,
        relative_attention_max_distance=17,
        dropout_rate=0.0,
        classifier_dropout=0.0,
        num_labels=2 if name.endswith("ForQuestionAnswering") else 5,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    config = head.config_class(**{**sizes, **changes})  # type: ignore[attr-defined]
    ids = torch.randint(2, 53, (3, 11))
    ids[:, -1] = 1
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    ids[1, 6], ids[1, 7:] = 1, 0
    mask[2, 9:] = 0
    ids[2, 8], ids[2, 9:] = 1, 0
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name.endswith(("T5Model", "ForConditionalGeneration")):
        batch["decoder_input_ids"] = torch.randint(2, 53, (3, 7))
    if name.endswith("ForConditionalGeneration"):
        batch["labels"] = torch.randint(2, 53, (3, 7))
        batch["labels"][0, 5:] = -100
    if name.endswith("ForSequenceClassification"):
        batch["labels"] = torch.tensor([3, 0, 4])
    if name.endswith("ForTokenClassification"):
        batch["labels"] = torch.randint(0, 5, (3, 11))
    if name.endswith("ForQuestionAnswering"):
        batch |= {"start_positions": torch.tensor([2, 1, 4]), "end_positions": torch.tensor([3, 5, 6])}
    return Example(head(config), batch)


def bart_example(head: Any, **changes: Any) -> Example:
    """BART, mBART or Whisper."""
    sizes: dict[str, Any] = dict(
        vocab_size=53,
        d_model=24,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=2,
        encoder_ffn_dim=37,
        decoder_ffn_dim=31,
        max_position_embeddings=40,
        dropout=0.0,
        num_labels=2 if head.__name__.endswith("ForQuestionAnswering") else 5,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        num_mel_bins=7,
        max_source_positions=11,
        max_target_positions=40,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    audio = head.__name__.startswith("Whisper")
    unused = ("max_position_embeddings",) if audio else ("num_mel_bins", "max_source_positions", "max_target_positions")
    config = head.config_class(**{**{k: v for k, v in sizes.items() if k not in unused}, **changes})
    ids, mask = padded_ids()
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if audio:
        batch = {"input_features": torch.randn(3, 7, 22)}
    batch["decoder_input_ids"] = torch.randint(2, 53, (3, 7))
    if head.__name__.endswith("ForConditionalGeneration"):
        batch["labels"] = torch.randint(2, 53, (3, 7))
    if head.__name__.endswith("Classification"):
        batch["labels"] = torch.tensor([3, 0, 4])
        del batch["decoder_input_ids"]
    if head.__name__.endswith("ForQuestionAnswering"):
        batch |= {"start_positions": torch.tensor([2, 1, 4]), "end_positions": torch.tensor([3, 5, 6])}
    return Example(head(config), batch)


def blip_example(head: type, **changes: Any) -> Example:
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


def blip_2_example(head: Any, **changes: Any) -> Example:
    """BLIP-2 with a T5 behind its Q-Former, whose first and third layer read the image."""
    size = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3)
    vision = dict(size, intermediate_size=37, image_size=12, patch_size=4, initializer_range=0.05)
    words = dict(TEXT_SIZES, intermediate_size=29, encoder_hidden_size=24, cross_attention_frequency=2)
    config = head.config_class(
        vision_config=vision,
        qformer_config={**words, "use_qformer_text_input": head.__name__.endswith("Retrieval"), **changes},
        text_config=t5_example(transformers.T5ForConditionalGeneration).model.config.to_dict(),  # type: ignore[operator]
        num_query_tokens=3,
        image_token_index=52,
        image_text_hidden_size=13,
    )
    batch: dict[str, Any] = {"pixel_values": torch.randn(3, 3, 12, 12)}
    if head.__name__.endswith(("Generation", "Retrieval")):
        batch["input_ids"], batch["attention_mask"] = padded_ids()
    if head.__name__.endswith("Generation"):
        batch["input_ids"][:, :3] = 52  # where the image's rows go
        batch["labels"] = torch.randint(2, 53, (3, 7))
    return Example(head(config), batch)


def gru_example(**changes: Any) -> Example:
    sizes = dict(vocab_size=53, d_model=22, num_layers=2, num_decoder_layers=2, num_attention_heads=2, dropout=0.0)
    config = GruConfig(**{**sizes, **changes})
    ids, mask = padded_ids()
    labels = torch.randint(2, 53, (3, 7))
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(2, 53, (3, 7)),
        "labels": labels,
    }
    labels[0, 5:] = -100
    return Example(GruForConditionalGeneration(config), batch)


ODD: dict[str, Callable[..., Example]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), t5_example),
    **dict.fromkeys(("bart", "mbart", "whisper"), bart_example),
    "blip": blip_example,
    "blip_2": blip_2_example,
}
