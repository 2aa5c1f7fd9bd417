"""Caption videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...backbones.video import BlipForVideoCaptioning
from ..metrics import score_texts
from ._captions import CaptionArguments, CaptionTask
from ._videos import VideoArguments, VideoTask


@dataclass(kw_only=True)
class VideoCaptionArguments(VideoArguments, CaptionArguments):
    """Flags of video captioning."""


class VideoCaptioning(VideoTask, CaptionTask):
    """A video column and a caption column."""

    model_class = BlipForVideoCaptioning
    Arguments = VideoCaptionArguments

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[Any], list[str], list[float]]:
        texts, references, losses = super().predict(model, batch)
        return list(zip(texts, self.chosen(model, batch["pixel_values"]), strict=True)), references, losses

    def score(self, predictions: Sequence[Any], references: Sequence[str]) -> dict[str, float]:
        scores = score_texts(self.args.metrics, [text for text, _ in predictions], references)
        return {**scores, **self.found([frames for _, frames in predictions])}
