"""SigLIP 2: images are given as patches, whose number depends on their shape, followed by padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.patches import noise_like
from ..modeling import heads
from ..modeling.family import Tower
from ..modeling.spec import TowerSpec
from ._siglip import ATTENTION, siglip_like

PATCHES = "pixel_values"  # [B, N, channels * patch * patch], not an image


def input_rows(tower: Tower, batch: Any) -> Tensor | None:
    """Return which rows are a patch of an image, or a token, bool ``[B, N]``."""
    if tower.spec.inputs != PATCHES or tower.name != "vision":
        return heads.input_rows(tower, batch)
    mask: Tensor | None = batch.get("pixel_attention_mask")
    return None if mask is None else mask.bool()


def replace_inputs(
    model: nn.Module, tower: Tower, batch: dict[str, Any], dropped: Tensor, how: str, seed: int
) -> dict[str, Any]:
    """Return the inputs of one tower with the dropped patches or tokens replaced."""
    if tower.name != "vision":
        return heads.replace_inputs(model, tower, batch, dropped, how, seed)
    patches: Tensor = batch[PATCHES]
    if how == "noise":
        other = noise_like(patches, seed)
    else:
        other = torch.zeros_like(patches) if how == "zero" else patches.roll(1, 1)
    return {PATCHES: torch.where(dropped.unsqueeze(-1), other, patches)}


VISION = TowerSpec(
    "vision",
    inputs=PATCHES,
    patchified=True,
    module="Siglip2VisionModel",
    layers="encoder.layers",
    attention_spec=ATTENTION,
    norm="layer_norm1",
    pooling="head",
)
SIGLIP2 = siglip_like(
    "siglip2",
    "Siglip2",
    VISION,
    {"input_rows": input_rows, "replace_inputs": replace_inputs},
    # it divides by the number of patches in the caller's mask
    counting_heads=("Siglip2ForImageClassification",),
)
