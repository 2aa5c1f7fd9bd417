"""CLIP: a text is read from left to right, and pooled at its end-of-text token, which is always kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modeling import heads
from ..modeling.arguments import Arguments
from ..modeling.family import Tower
from ..modeling.spec import AttentionSpec, ModelSpec, PatchSpec, TowerSpec

LEGACY_EOS = 2  # in configurations with this id, CLIP pools at the highest id of a text


def end_of_text(tower: Any, arguments: Arguments) -> Tensor | None:
    """Return the row that the text tower pools at, bool ``[B, N]``."""
    ids: Tensor | None = arguments.get("input_ids")
    if ids is None:
        return None  # Transformers raises the error
    ids = ids.view(-1, ids.shape[-1])
    found = ids if tower.eos_token_id == LEGACY_EOS else (ids == tower.eos_token_id).int()
    return torch.arange(ids.shape[1], device=ids.device) == found.argmax(-1, keepdim=True)


def replace_inputs(
    model: nn.Module, tower: Tower, batch: dict[str, Any], dropped: Tensor, how: str, seed: int
) -> dict[str, Any]:
    """Return the changed inputs of one tower; a text still ends in the same position, because it is pooled there."""
    if tower.name != "text" or tower.module.eos_token_id != LEGACY_EOS:
        return heads.replace_inputs(model, tower, batch, dropped, how, seed)
    ids: Tensor = batch["input_ids"]
    end = end_of_text(tower.module, Arguments(("input_ids",), (ids,), {}))
    ordinary = heads.ordinary_tokens(tower.config)
    return {"input_ids": heads.replace_tokens(ids, dropped, ordinary[ordinary < ids[end].min().item()], how, seed)}


ATTENTION = AttentionSpec(output="out_proj", scale="scale", dropout="dropout")
CLIP = ModelSpec(
    name="clip",
    family="transformers.models.clip.",
    towers=(
        TowerSpec(
            "vision",
            inputs="pixel_values",
            module="CLIPVisionModel",
            layers="encoder.layers",
            attention_spec=ATTENTION,
            norm="layer_norm1",
            protect_first=1,
            patches=PatchSpec(
                "CLIPVisionEmbeddings",
                projection="patch_embedding",
                positions="position_embedding",
                cls="class_embedding",
            ),
        ),
        TowerSpec(
            "text",
            module="CLIPTextModel",
            layers="encoder.layers",
            attention_spec=ATTENTION,
            norm="layer_norm1",
            causal=True,
            only=("inputs", "tokens"),
            protect_last=True,
            always=end_of_text,  # padding may follow it
            pools_by_place=True,
        ),
    ),
    recommended=("vision.tokens.25%", "text.tokens.25%"),
    averaging_heads=("CLIPForImageClassification",),
    heads=(
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPForImageClassification",
        "CLIPTextModelWithProjection",
        "CLIPModel",
    ),
    functions={"replace_inputs": replace_inputs, "token_loss": heads.pair_loss},
)
