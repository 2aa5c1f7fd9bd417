"""An image encoder and a text encoder, each with the sites of its own family."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modeling import heads
from ..modeling.spec import ModelSpec, TowerSpec
from . import towers_inside


def find_towers(model: Any) -> dict[str, tuple[TowerSpec, nn.Module]]:
    """Return the towers, with the rows of their own families."""
    if not heads.extends(model, ["VisionTextDualEncoderModel"]):
        return {}
    return towers_inside(model, {"vision": "vision_model", "text": "text_model"})


VISION_TEXT_DUAL_ENCODER = ModelSpec(
    name="vision_text_dual_encoder",
    family="transformers.models.vision_text_dual_encoder.",
    # the usual towers; ``find_towers`` finds those that a checkpoint actually has
    towers=(
        TowerSpec("vision", module="ViTModel", layers="layers", inputs="pixel_values"),
        TowerSpec("text", module="BertModel", layers="encoder.layer"),
    ),
    recommended=("vision.tokens.25%", "text.tokens.25%"),
    hands_down=False,
    find_towers=find_towers,
    functions={"token_loss": heads.pair_loss},
)
