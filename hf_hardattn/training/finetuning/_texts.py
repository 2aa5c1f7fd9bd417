"""Shared code of the T5 tasks: texts to token ids, and generated token ids back to texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, T5ForConditionalGeneration

from ...errors import HardAttentionError
from ..arguments import flag
from ..metrics import score_texts
from ..rows import text
from ..sources import column
from . import Base, TaskArguments


@dataclass(kw_only=True)
class TextArguments(TaskArguments):
    """Flags of the tasks that generate a text."""

    output_dir: str = flag("outputs/t5", "Directory for the model, results.json, log.jsonl and checkpoints.")
    source_column: str | None = flag(None, "Column of the input: one of the usual names by default.")
    target_column: str | None = flag(None, "Column of the output: one of the usual names by default.")
    source_lang: str | None = flag(None, "Key of the input in a `translation` column.")
    target_lang: str | None = flag(None, "Key of the output in a `translation` column.")
    source_prefix: str = flag("", "Text to put before each input, e.g. 'summarize: '.")
    max_source_length: int = flag(512, "Maximum number of tokens of the input; longer inputs are truncated.")
    max_target_length: int = flag(128, "Maximum number of tokens of the output; longer outputs are truncated.")
    num_beams: int = flag(1, "Beams in evaluation.")
    metrics: list[str] = flag(["bleu"], "bleu (with chrF) | rouge | cider | exact_match")


class TokensTask(Base):
    """Base class of the tasks that read texts; the tokenizer must fit the model."""

    processor_class = AutoTokenizer

    def build(self, config: PreTrainedConfig, processor: Any) -> None:
        super().build(config, processor)
        if len(processor) > config.vocab_size:
            raise HardAttentionError(
                f"the tokenizer has {len(processor)} tokens and the model {config.vocab_size}; they do not match. "
                "Pass the model's own tokenizer as --processor_name."
            )

    def pad(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Pad token ids to ``input_ids`` and ``attention_mask``, to a multiple of 8 in mixed precision."""
        multiple = None if self.accelerator.mixed_precision == "no" else 8
        padded = self.processor.pad({"input_ids": rows}, pad_to_multiple_of=multiple, return_tensors="pt")
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}

    def encode(self, words: str, longest: int) -> list[int]:
        """Return the token ids of a text, cut after ``longest``."""
        ids: list[int] = self.processor(words, truncation=True, max_length=longest)["input_ids"]
        return ids


class T5Task(TokensTask):
    """Base class of the T5 tasks."""

    families = ("t5",)
    adapters = ("q", "v")


class TextToText(T5Task):
    """Generate a text from a text.

    Class attributes:
        sources, targets: usual names of the two columns.
    """

    model_class = T5ForConditionalGeneration
    Arguments: ClassVar[type[TaskArguments]] = TextArguments
    sources: ClassVar[tuple[str, ...]] = ("source", "text", "document", "article")
    targets: ClassVar[tuple[str, ...]] = ("target", "summary", "highlights")

    def columns(self, data: Dataset) -> None:
        args = self.args
        if args.source_lang or args.target_lang:
            if not (args.source_lang and args.target_lang):
                raise HardAttentionError(
                    "one language is missing; --source_lang and --target_lang must be given together."
                )
            column(data, "translation", (), "--source_column and --target_column")
            self.source, self.target = args.source_lang, args.target_lang
        else:
            self.source = column(data, args.source_column, self.sources, "--source_column")
            self.target = column(data, args.target_column, self.targets, "--target_column")
        score_texts(args.metrics, ["a"], ["a"])  # a missing package raises now, not after the training

    def pair(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return the input and the target text of a row."""
        row = row["translation"] if self.args.source_lang else row
        return self.args.source_prefix + text(row, self.source), text(row, self.target)

    def check_row(self, row: dict[str, Any]) -> None:
        self.pair(row)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [self.pair(row) for row in rows]
        batch = self.pad([self.encode(source, self.args.max_source_length) for source, _ in pairs])
        labels = self.pad([self.encode(target, self.args.max_target_length) for _, target in pairs])
        return {**batch, "labels": labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[str], list[str], list[float]]:
        labels = batch["labels"]
        logits = model(**batch).logits.float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        generated = self.accelerator.unwrap_model(model).generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_beams=self.args.num_beams,
            max_new_tokens=self.args.max_target_length,
            max_length=None,  # the checkpoint's max_length would cause a warning at each call
        )
        references = labels.masked_fill(labels == -100, self.processor.pad_token_id)
        texts = [self.processor.batch_decode(ids, skip_special_tokens=True) for ids in (generated, references)]
        return *texts, mean_loss(losses, labels)

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return score_texts(self.args.metrics, predictions, references)


def mean_loss(losses: Tensor, labels: Tensor) -> list[float]:
    """Mean of ``losses`` ``[B, T]`` over the labels of each example, without those that are ignored (-100)."""
    means: list[float] = (losses.sum(1) / (labels != -100).sum(1).clamp(min=1)).tolist()
    return means


def pad_rows(rows: list[list[int]], value: int) -> Tensor:
    """Pad lists of token ids to one int64 tensor ``[B, T]``."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
