"""BLIP for videos: the patches of all frames follow CLS in one row, so that every site of the vision tower chooses among them.

The vision tower attends within and between the frames. Frames are chosen at ``vision.inputs`` with scorer ``conv`` and its option
``whole_frames``, before anything but the patch embedding is computed. Patches within them are chosen at ``vision.tokens.L``.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionEmbeddings

from ..errors import HardAttentionError
from ..modeling.selection import Selection


class VideoEmbeddings(BlipVisionEmbeddings):
    """``BlipVisionEmbeddings`` that also takes videos; a position in the image has the same embedding in every frame."""

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Map ``[B, C, H, W]`` to ``[B, 1 + P, D]`` as usual, and ``[B, F, C, H, W]`` to ``[B, 1 + F * P, D]``, frame after frame."""
        if pixel_values.dim() == 4:
            return super().forward(pixel_values, interpolate_pos_encoding)
        frames = super().forward(pixel_values.flatten(0, 1), interpolate_pos_encoding)
        frames = frames.unflatten(0, pixel_values.shape[:2])
        return torch.cat([frames[:, 0, :1], frames[:, :, 1:].flatten(1, 2)], 1)


def _watch(model: Any) -> None:
    """Replace the image embeddings of a newly built BLIP with video embeddings."""
    embeddings: Any = model.vision_model.embeddings
    if getattr(embeddings, "input_selector", None) is not None:
        raise HardAttentionError(
            f"scorer '{embeddings.input_selector.config.scorer}' reads the pixels of an image, but {type(model).__name__} takes videos. Use scorer "
            "'conv' at 'vision.inputs', with its options frames and whole_frames."
        )
    embeddings.__class__ = VideoEmbeddings


class BlipForVideoCaptioning(transformers.BlipForConditionalGeneration):
    """The stock captioning model, with its weights and keys, that also accepts videos as ``pixel_values`` ``[B, F, C, H, W]``."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        _watch(self)


class BlipForVideoTextRetrieval(transformers.BlipForImageTextRetrieval):
    """The stock retrieval model, with its weights and keys, that also accepts videos as ``pixel_values`` ``[B, F, C, H, W]``."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        _watch(self)


def kept_frames(selection: Selection, patches: int) -> list[list[int]]:
    """Return the frames of each row in which a patch was kept, sorted.

    Args:
        selection: selection of ``vision.inputs``, with CLS first. patches: P, patches per frame.
    """
    mask = selection.mask[:, 0, 0, 1:].unflatten(1, (-1, patches)).any(-1)
    return [row.nonzero()[:, 0].tolist() for row in mask]
