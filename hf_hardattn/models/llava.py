"""Llava: any image tower and any decoder; the decoder's sites choose among the image's rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..modeling import heads
from ..modeling.spec import ModelSpec, TowerSpec
from . import towers_inside


def find_towers(model: Any) -> dict[str, tuple[TowerSpec, nn.Module]]:
    """Return the towers, with the rows of their own families; the decoder counts the image's rows, so the image tower keeps them all."""
    inner = getattr(model, "model", model)
    if not hasattr(inner, "language_model"):
        return {}
    found = towers_inside(inner, {"vision": "vision_tower", "decoder": "language_model"})
    return {
        name: (replace(spec, only=("self",)) if name == "vision" else spec, module)
        for name, (spec, module) in found.items()
    }


LLAVA = ModelSpec(
    name="llava",
    family="transformers.models.llava.",
    # the usual towers; ``find_towers`` finds those that a checkpoint actually has
    towers=(
        TowerSpec("vision", module="CLIPVisionModel", layers="encoder.layers", inputs="pixel_values", only=("self",)),
        TowerSpec("decoder", module="LlamaModel", layers="layers", prompt=True),
    ),
    recommended=("decoder.tokens.25%",),
    heads=("LlavaForConditionalGeneration", "LlavaModel"),
    candidates=("image_token_id",),
    find_towers=find_towers,
    functions=heads.NEXT_TOKEN,
)
