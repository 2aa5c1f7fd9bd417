"""Whisper: the encoder's rows are audio frames, two columns of the spectrogram apart, each computed from the columns around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional.patches import noise_like
from ..modeling.family import Tower
from ._bart import bart_like

STRIDE, REACH = 2, 2  # columns from one frame to the next, and columns that a frame reads before and after its own


def input_rows(tower: Tower, batch: Any) -> Tensor | None:
    """Return the encoder's frames, bool ``[B, frames]``."""
    features = batch.get("input_features")
    if features is None or tower.name != "encoder":
        return None
    return torch.ones(len(features), features.shape[-1] // STRIDE, dtype=torch.bool, device=features.device)


def replace_inputs(
    model: nn.Module, tower: Tower, batch: dict[str, Any], dropped: Tensor, how: str, seed: int
) -> dict[str, Any]:
    """Return the spectrogram, in which every column that no kept frame reads is replaced."""
    features: Tensor = batch["input_features"]
    kept = (~dropped).to(features.dtype).repeat_interleave(STRIDE, 1)
    kept[:, 1::STRIDE] = 0.0  # a frame is at the first of its columns
    read = nn.functional.max_pool1d(kept[:, None], 2 * REACH + 1, stride=1, padding=REACH) > 0
    if how == "noise":
        other = noise_like(features, seed)
    else:
        other = torch.zeros_like(features) if how == "zero" else features.roll(1, -1)
    return {"input_features": torch.where(read, features, other)}


WHISPER = bart_like(
    "whisper",
    "Whisper",
    norm="self_attn_layer_norm",
    encoder={"inputs": "input_features"},
    heads=("ForConditionalGeneration", "Model", "ForAudioClassification"),
    copying_heads=(),
    averaging_heads=("WhisperForAudioClassification",),
    functions={"input_rows": input_rows, "replace_inputs": replace_inputs},
)
