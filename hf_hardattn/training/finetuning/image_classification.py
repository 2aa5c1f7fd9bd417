"""Classify images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig, ViTForImageClassification

from ..arguments import flag
from ..metrics import accuracy
from ..rows import class_names, label_number, label_numbers
from ..sources import column
from ._images import ImageArguments, ImageTask


@dataclass(kw_only=True)
class ClassArguments(ImageArguments):
    """Flags of image classification."""

    output_dir: str = flag("outputs/vit", "Directory for the model, results.json, log.jsonl and checkpoints.")
    label_column: str | None = flag(None, "Column of labels: label or labels by default.")
    random_flip: bool = flag(False, "Mirror half of the training images.")


class ImageClassification(ImageTask):
    """An image column and a label column; the model's configuration stores the names of the labels."""

    families = ("vit",)
    first = "vit"
    model_class = ViTForImageClassification
    Arguments = ClassArguments
    heads = ("classifier",)
    adapters = ("q_proj", "v_proj")

    def __init__(self, args: ClassArguments, accelerator: Accelerator) -> None:
        super().__init__(args, accelerator)
        self.augment = flip if args.random_flip else None

    def columns(self, data: Dataset) -> None:
        super().columns(data)
        self.label = column(data, self.args.label_column, ("label", "labels"), "--label_column")
        feature = data.features[self.label]
        self.names = feature if isinstance(feature, ClassLabel) else None

    def changes(self, training: Dataset | None) -> dict[str, Any]:
        return class_names(training, self.label)

    def build(self, config: PreTrainedConfig, processor: Any) -> None:
        super().build(config, processor)
        self.label2id = label_numbers(config)
        self.mode = "L" if config.num_channels == 1 else "RGB"

    def check_row(self, row: dict[str, Any]) -> None:
        super().check_row(row)
        label_number(row[self.label], self.names, self.label2id)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = [label_number(row[self.label], self.names, self.label2id) for row in rows]
        return {"pixel_values": self.pixels(rows), "labels": torch.tensor(labels)}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
        logits = model(pixel_values=batch["pixel_values"]).logits.float()
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return logits.argmax(-1).tolist(), batch["labels"].tolist(), losses.tolist()

    def score(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return accuracy(predictions, references)


def flip(batch: dict[str, Any]) -> dict[str, Any]:
    """Mirror each image with probability 1/2."""
    pixels = batch["pixel_values"]
    chosen = torch.rand(len(pixels), 1, 1, 1).to(pixels) < 0.5
    return {**batch, "pixel_values": torch.where(chosen, pixels.flip(-1), pixels)}
