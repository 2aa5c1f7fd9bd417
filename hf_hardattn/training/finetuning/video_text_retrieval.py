"""Find texts by videos and videos by texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...backbones import video
from ._retrieval import BlipForImageTextRetrieval, RetrievalArguments, RetrievalTask
from ._videos import VideoArguments, VideoTask


class BlipForVideoTextRetrieval(BlipForImageTextRetrieval, video.BlipForVideoTextRetrieval):
    """Retrieval model for videos, with the training loss of the model for images."""


@dataclass(kw_only=True)
class VideoRetrievalArguments(VideoArguments, RetrievalArguments):
    """Flags of video-text retrieval."""


class VideoTextRetrieval(VideoTask, RetrievalTask):
    """A video column and a text column."""

    model_class = BlipForVideoTextRetrieval
    Arguments = VideoRetrievalArguments

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[Any], list[str], list[float]]:
        items, references, losses = super().predict(model, batch)
        return list(zip(items, self.chosen(model, batch["pixel_values"]), strict=True)), references, losses

    def score(self, predictions: Sequence[Any], references: Sequence[str]) -> dict[str, float]:
        scores = super().score([item for item, _ in predictions], references)
        return {**scores, **self.found([frames for _, frames in predictions])}
