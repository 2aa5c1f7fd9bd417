"""Tiny vision–language models, and the stock model as their oracle: what was dropped is hidden from it by masks."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from decoders import SIZES, STEPS, hiding
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

IMAGE, START, END, VIDEO = 45, 46, 47, 48


def llava() -> tuple[Any, dict[str, Any]]:
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=29)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=4)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_id=IMAGE, vision_feature_layer=-1
    )
    # the second row is padded on the left
    ids = torch.tensor([[3, 4, 5, *[IMAGE] * 16, 20, 21, 22], [0, 0, 6, *[IMAGE] * 16, 23, 24, 25]])
    return LlavaForConditionalGeneration._from_config(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 16, 16),
    }


def qwen() -> tuple[Any, dict[str, Any]]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = dict(depth=2, hidden_size=24, intermediate_size=29, num_heads=3, patch_size=4, out_hidden_size=24)
    config = Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_parameters": rope, "head_dim": None},
        vision_config={**vision, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=VIDEO,
    )
    ids = torch.tensor([[3, 4, START, *[IMAGE] * 16, END, 5, 6], [0, 8, START, *[IMAGE] * 16, END, 9, 10]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(128, 96), "image_grid_thw": torch.tensor([[1, 8, 8]] * 2)}
    return Qwen2_5_VLForConditionalGeneration._from_config(config), {**batch, "mm_token_type_ids": (ids == IMAGE).int()}


BUILDERS = {"llava": llava, "qwen2_5_vl": qwen}
ALLOWED = torch.ones(SIZES["vocab_size"], dtype=torch.bool)  # what may be written
ALLOWED[[SIZES["eos_token_id"], IMAGE, START, END, VIDEO]] = False


@functools.cache
def _stock(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.suppress_tokens = [IMAGE, START, END, VIDEO]
    return model.eval(), {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


def stock(name: str) -> tuple[Any, dict[str, Any]]:
    model, batch = _stock(name)
    return copy.deepcopy(model), dict(batch)


def oracle(name: str, batch: dict[str, Any], chosen: dict[str, Tensor], prompt: int) -> Tensor:
    """Logits of the stock model without a cache, from which the dropped rows are hidden."""
    model, _ = stock(name)
    layers = model.model.language_model.layers
    if name == "llava":
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        batch = {**batch, "position_ids": positions}
    with hiding(layers, batch["attention_mask"], chosen, None, prompt), torch.no_grad():
        return model(**batch, use_cache=False).logits


def grown(batch: dict[str, Any], token: Tensor) -> dict[str, Any]:
    """The batch with one more token a row."""
    added = {
        "input_ids": token,
        "attention_mask": torch.ones_like(token),
        "mm_token_type_ids": torch.zeros_like(token).int(),
    }
    return {key: torch.cat((value, added[key]), 1) if key in added else value for key, value in batch.items()}


def written_by_oracle(name: str, batch: dict[str, Any], chosen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the oracle writes, token by token: the text ``[B, N + STEPS]``, and the logits ``[B, STEPS, V]``."""
    prompt, logits = batch["input_ids"].shape[1], []
    for _ in range(STEPS):
        logits.append(oracle(name, batch, chosen, prompt)[:, -1].masked_fill(~ALLOWED, -torch.inf))
        batch = grown(batch, logits[-1].argmax(-1, keepdim=True))
    return batch["input_ids"], torch.stack(logits, 1)
