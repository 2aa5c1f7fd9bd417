"""Shared code of the captioning tasks for images and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration

from ..arguments import flag
from ..metrics import score_texts
from ..rows import text
from ..sources import column
from ._blip import BlipArguments, BlipTask
from ._texts import mean_loss


@dataclass(kw_only=True)
class CaptionArguments(BlipArguments):
    """Flags of captioning."""

    caption_column: str | None = flag(None, "Column of captions: caption or text by default.")
    num_beams: int = flag(1, "Beams in evaluation.")
    metrics: list[str] = flag(["bleu", "rouge"], "bleu (with chrF) | rouge | cider | bleu4 | answers")


class CaptionTask(BlipTask):
    """Base class of the captioning tasks."""

    model_class = BlipForConditionalGeneration
    Arguments = CaptionArguments

    def columns(self, data: Dataset) -> None:
        super().columns(data)
        self.caption = column(data, self.args.caption_column, ("caption", "text"), "--caption_column")
        score_texts(self.args.metrics, ["a"], ["a"])  # a missing package raises now, not after the training

    def check_row(self, row: dict[str, Any]) -> None:
        super().check_row(row)
        text(row, self.caption)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        special = self.text_config  # generation starts at bos and stops at sep
        ids = [self.encode(text(row, self.caption), special.bos_token_id, special.sep_token_id) for row in rows]
        tokens, mask = self.pad(ids)
        labels = tokens.masked_fill(mask == 0, -100)
        return {"pixel_values": self.pixels(rows), "input_ids": tokens, "attention_mask": mask, "labels": labels}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[str], list[str], list[float]]:
        logits, labels = model(**batch).logits.float()[:, :-1], batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        generated = self.accelerator.unwrap_model(model).generate(
            pixel_values=batch["pixel_values"],
            num_beams=self.args.num_beams,
            max_new_tokens=self.args.max_target_length,
            max_length=None,  # the checkpoint's max_length would cause a warning at each call
        )
        decode = self.processor.tokenizer.batch_decode
        texts = [decode(ids, skip_special_tokens=True) for ids in (generated, batch["input_ids"])]
        return *texts, mean_loss(losses, labels)

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return score_texts(self.args.metrics, predictions, references)
