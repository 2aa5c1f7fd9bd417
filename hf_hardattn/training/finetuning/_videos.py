"""Shared code of the two video tasks: frames to pixel values, and how well a hard model finds the frames that matter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn

from ...backbones.video import kept_frames
from ...errors import HardAttentionError
from ...modeling.context import is_soft_now
from ...recording import record, selectors
from ..arguments import flag
from ..loop import Task
from ..sources import column
from ..videos import as_files, check_frames, read_frames
from ._blip import BlipTask

SITE = "vision.inputs"


@dataclass(kw_only=True)
class VideoArguments:
    """Flags of the video tasks."""

    folder_format: ClassVar[str] = "videofolder"
    image_column: str | None = flag(
        None, "Column of videos (files, folders of images, or lists of images): video or frames by default."
    )
    num_frames: int = flag(8, "Number of evenly spaced frames to read from each video.")
    planted_column: str | None = flag(
        None, "Column of the numbers of the frames that matter, if known: used to score the selection."
    )


class VideoTask(BlipTask):
    """A BLIP task whose rows hold a video. It is mixed into an image task and passes it pixel values ``[B, F, C, H, W]``."""

    planted: list[list[int]] | None = None

    def columns(self, data: Dataset) -> None:
        super().columns(data)
        if self.args.vision_features:
            raise HardAttentionError(
                "--vision_features stores the tower's outputs for single images; for a video, the tower processes all frames together. Leave it out."
            )
        if self.args.planted_column:
            column(data, self.args.planted_column, (), "--planted_column")

    def find_image(self, data: Dataset) -> str:
        return column(data, self.args.image_column, ("video", "frames"), "--image_column")

    def prepare(self, data: Dataset, file: str | None) -> Dataset:
        self.folder = Path(file).expanduser().resolve().parent if file else Path.cwd()
        return as_files(data, self.image)

    def check_image(self, row: dict[str, Any]) -> None:
        check_frames(row[self.image], self.folder)

    def pixels(self, rows: list[dict[str, Any]]) -> Tensor:
        videos = [read_frames(row[self.image], self.folder, self.args.num_frames) for row in rows]
        return torch.stack([self.image_processor(frames, return_tensors="pt")["pixel_values"] for frames in videos])

    def setup(self) -> Task:
        task = super().setup()
        if self.args.planted_column and task.validation is not None:
            self.planted = [list(frames) for frames in task.validation[self.args.planted_column]]
        return task

    def chosen(self, model: nn.Module, pixels: Tensor) -> list[list[int]]:
        """Return the frames of each video that a hard model computes on; all frames for a soft model."""
        inner: Any = self.accelerator.unwrap_model(model)
        selector = selectors(inner).get(SITE)
        if selector is None or is_soft_now(selector):
            return [list(range(pixels.shape[1]))] * len(pixels)
        with record(inner) as selections:
            inner.vision_model(pixel_values=pixels)
        return kept_frames(selections[SITE][0], inner.vision_model.embeddings.num_patches)

    def found(self, chosen: list[list[int]]) -> dict[str, float]:
        """Recall and precision of the kept frames, in [0, 1]; empty if no column says which frames matter."""
        if self.planted is None:
            return {}
        hits = [len(set(kept) & set(gold)) for kept, gold in zip(chosen, self.planted, strict=True)]
        return {
            "frame_recall": sum(hits) / max(sum(map(len, self.planted)), 1),
            "frame_precision": sum(hits) / max(sum(map(len, chosen)), 1),
        }
