"""Answer questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import BlipForQuestionAnswering

from ..arguments import flag
from ..metrics import score_texts
from ..rows import text
from ..sources import column
from ._blip import BlipArguments, BlipTask


@dataclass(kw_only=True)
class QuestionArguments(BlipArguments):
    """Flags of visual question answering."""

    question_column: str | None = flag(None, "Column of questions: question by default.")
    answer_column: str | None = flag(None, "Column of answers: answer by default.")
    num_beams: int = flag(1, "Beams in evaluation.")
    metrics: list[str] = flag(["answers"], "answers (exact match and word F1) | bleu | rouge | cider | bleu4")


class VisualQuestionAnswering(BlipTask):
    """An image, a question and an answer column; the answer is generated, not chosen from a list."""

    model_class = BlipForQuestionAnswering
    Arguments = QuestionArguments

    def columns(self, data: Dataset) -> None:
        super().columns(data)
        self.question = column(data, self.args.question_column, ("question",), "--question_column")
        self.answer = column(data, self.args.answer_column, ("answer",), "--answer_column")
        score_texts(self.args.metrics, ["a"], ["a"])  # a missing package raises now, not after the training

    def check_row(self, row: dict[str, Any]) -> None:
        super().check_row(row)
        text(row, self.question), text(row, self.answer)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        special, tokenizer = self.text_config, self.processor.tokenizer
        first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        questions, mask = self.pad([self.encode(text(row, self.question), first, special.sep_token_id) for row in rows])
        answers = [self.encode(text(row, self.answer), special.bos_token_id, special.sep_token_id) for row in rows]
        tokens, counted = self.pad(answers)
        return {
            "pixel_values": self.pixels(rows),
            "input_ids": questions,
            "attention_mask": mask,
            "decoder_input_ids": tokens,  # without them the stock model would embed the -100 of the labels
            "decoder_attention_mask": counted,
            "labels": tokens.masked_fill(counted == 0, -100),
        }

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[str], list[str], list[float]]:
        loss = float(model(**batch).loss)  # the model returns only the mean over the batch
        generated = self.accelerator.unwrap_model(model).generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            num_beams=self.args.num_beams,
            max_new_tokens=self.args.max_target_length,
            max_length=None,  # the checkpoint's max_length would cause a warning at each call
        )
        decode = self.processor.tokenizer.batch_decode
        texts = [decode(ids, skip_special_tokens=True) for ids in (generated, batch["decoder_input_ids"])]
        return *texts, [loss] * len(texts[0])

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return score_texts(self.args.metrics, predictions, references)
