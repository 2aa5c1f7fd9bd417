"""Classify texts: BERT and its successors by their first token, T5 with encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ..arguments import flag
from ..metrics import accuracy
from ..rows import class_names, label_number, label_numbers, text
from ..sources import column
from . import TaskArguments
from ._encoders import EncoderTask, encoders


@dataclass(kw_only=True)
class TextClassArguments(TaskArguments):
    """Flags of text classification."""

    output_dir: str = flag(
        "outputs/text_classification", "Directory for the model, results.json, log.jsonl and checkpoints."
    )
    text_column: str | None = flag(None, "Column of texts: text or sentence by default.")
    label_column: str | None = flag(None, "Column of labels: label or labels by default.")
    max_source_length: int = flag(512, "Maximum number of tokens of a text; longer texts are truncated.")


class TextClassification(EncoderTask):
    """A text column and a label column; the model's configuration stores the names of the labels."""

    families = ("encoder", "t5")
    first = "encoder"
    model_class = AutoModelForSequenceClassification
    classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    Arguments = TextClassArguments
    heads = ("classifier", "pre_classifier", "pooler", "classification_head")
    adapters = (*EncoderTask.adapters, "q", "v")

    @classmethod
    def model_types(cls) -> tuple[str, ...]:
        return (*encoders(), "t5")

    def columns(self, data: Dataset) -> None:
        self.text = column(data, self.args.text_column, ("text", "sentence"), "--text_column")
        self.label = column(data, self.args.label_column, ("label", "labels"), "--label_column")
        feature = data.features[self.label]
        self.names = feature if isinstance(feature, ClassLabel) else None

    def changes(self, training: Dataset | None) -> dict[str, Any]:
        return class_names(training, self.label)

    def build(self, config: PreTrainedConfig, processor: Any) -> None:
        super().build(config, processor)
        self.label2id = label_numbers(config)

    def check_row(self, row: dict[str, Any]) -> None:
        text(row, self.text)
        label_number(row[self.label], self.names, self.label2id)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = [label_number(row[self.label], self.names, self.label2id) for row in rows]
        ids = [self.encode(text(row, self.text), self.args.max_source_length) for row in rows]
        return {**self.pad(ids), "labels": torch.tensor(labels)}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return logits.argmax(-1).tolist(), batch["labels"].tolist(), losses.tolist()

    def score(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return accuracy(predictions, references)
