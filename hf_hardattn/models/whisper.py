"""Whisper: the encoder's rows are audio frames, two columns of the spectrogram apart, each computed from the columns around it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..functional.patches import noise_like
from ..modeling.family import Tower
from ._bart import bart_like

TIMES = "_extract_token_timestamps"  # method that aligns tokens with frames
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


def times_of_tokens(model: Any, outputs: Any, alignment_heads: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the time of each token, as the stock method computes it from the attention of some heads to every frame.

    Raises:
        HardAttentionError: if nothing attends to a frame: that method divides by how much the attention to a frame varies.
    """
    for layer, head in alignment_heads:
        seen = sum(step[layer][:, head].sum(-2) for step in outputs.cross_attentions)
        if not seen.all():
            raise HardAttentionError(
                f"return_token_timestamps=True with frames that layer {layer} of the decoder does not read; the time of a token is found from "
                "attention to every frame. Generate inside hf_hardattn.soft(model), or use budget 1.0 at the sites 'encoder.inputs', "
                "'encoder.tokens' and 'decoder.cross'."
            )
    return getattr(type(model), TIMES)(model, outputs, alignment_heads, *args, **kwargs)


def prepare(model: nn.Module) -> None:
    """Guard the method that finds the times of tokens; ``release`` undoes it."""
    for module in model.modules():
        if hasattr(module, TIMES):
            module.__dict__[TIMES] = functools.partial(times_of_tokens, module)


def release(model: nn.Module) -> None:
    """Remove the guard."""
    for module in model.modules():
        module.__dict__.pop(TIMES, None)


WHISPER = bart_like(
    "whisper",
    "Whisper",
    norm="self_attn_layer_norm",
    encoder={"inputs": "input_features"},
    heads=("ForConditionalGeneration", "Model", "ForAudioClassification"),
    copying_heads=(),
    averaging_heads=("WhisperForAudioClassification",),
    functions={
        "input_rows": input_rows,
        "replace_inputs": replace_inputs,
        "prepare": prepare,
        "release": release,
    },
)
