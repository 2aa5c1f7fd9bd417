"""The hard models that the Hub's tests save and push, tiny and of odd sizes; and what a model says about a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples import build  # noqa: E402

import hf_hardattn

HARD = {"sites": ["vision.inputs", "vision.tokens.1"], "budget": 0.5}


def stock(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return build("vit", "ViTForImageClassification").model.eval()


def harden(model: PreTrainedModel, config: dict | None = None) -> PreTrainedModel:
    """Make it hard, with selectors that choose something."""
    hf_hardattn.apply(model, {"scorer": "linear", **(config or HARD)})
    torch.manual_seed(1)
    with torch.no_grad():
        for selector in hf_hardattn.selectors(model).values():
            for parameter in selector.parameters():
                parameter.normal_()
    return model.eval()


def with_adapter(model: PreTrainedModel):
    from peft import LoraConfig, get_peft_model

    whole = ["selector", "input_selector"]
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=whole))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    return adapted.eval()


def answer(model) -> dict:
    """Logits and selections on a fixed batch."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.rand(
        3, model.config.num_channels, model.config.image_size, model.config.image_size, generator=generator
    )
    with hf_hardattn.record(model) as selections, torch.no_grad():
        logits = model(pixel_values=pixels).logits
    return {"logits": logits, "selections": [(s.site, s.mask) for s in selections]}


def same(one: dict, other: dict) -> bool:
    """Bit for bit the same logits and selections."""
    pairs = list(zip(one["selections"], other["selections"], strict=True))
    masks = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    return bool(pairs) and masks and torch.equal(one["logits"], other["logits"])


def keep_answer(model, path: str | Path) -> None:
    torch.save(answer(model), path)
