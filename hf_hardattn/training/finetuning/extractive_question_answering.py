"""Answer questions by marking the span of the answer in a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import T5ForQuestionAnswering

from ...errors import HardAttentionError
from ..metrics import answers
from ..rows import text
from ..sources import column
from ._questions import AnswerArguments, answer, prompt
from ._texts import T5Task

LONGEST = 30  # most tokens of an answer
CUT = "[the answer was cut off]"


class ExtractiveQuestionAnswering(T5Task):
    """A question, a context and an answer column. An answer beyond ``--max_source_length`` adds no loss and counts as missed."""

    model_class = T5ForQuestionAnswering
    Arguments = AnswerArguments
    heads = ("qa_outputs",)

    def columns(self, data: Dataset) -> None:
        args = self.args
        self.question = column(data, args.question_column, ("question",), "--question_column")
        self.context = column(data, args.context_column, ("context",), "--context_column")
        self.answer = column(data, args.answer_column, ("answers", "answer"), "--answer_column")

    def read(self, row: dict[str, Any]) -> tuple[str, int, int]:
        """Return the input text and the characters where the answer starts and ends in it."""
        before, context = prompt(text(row, self.question)), text(row, self.context)
        words, start = answer(row, self.answer)
        start = context.find(words) if start is None else start
        if start < 0 or context[start : start + len(words)] != words:
            raise HardAttentionError(
                f"the answer {words!r} does not occur in the context{f' at character {start}' if start >= 0 else ''}; an extractive answer must "
                "be an exact substring of it. Fix the row, or use --task generative_question_answering."
            )
        return before + context, len(before) + start, len(before) + start + len(words)

    def check_row(self, row: dict[str, Any]) -> None:
        self.read(row)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, spans = [], []
        for row in rows:
            words, start, end = self.read(row)
            encoded = self.processor(
                words, truncation=True, max_length=self.args.max_source_length, return_offsets_mapping=True
            )
            ids.append(encoded["input_ids"])
            inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
            whole = inside and encoded["offset_mapping"][inside[-1]][1] >= end
            spans.append((inside[0], inside[-1]) if whole else (None, None))
        batch = self.pad(ids)
        width = batch["input_ids"].shape[1]  # the loss ignores a position after the last token
        first, last = (
            torch.tensor([width if place is None else place for place in places]) for places in zip(*spans, strict=True)
        )
        return {**batch, "start_positions": first, "end_positions": last}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[str], list[str], list[float]]:
        ids, mask, first, last = (
            batch[name] for name in ("input_ids", "attention_mask", "start_positions", "end_positions")
        )
        output = model(input_ids=ids, attention_mask=mask)
        starts, ends = (x.float().masked_fill(mask == 0, -1e4) for x in (output.start_logits, output.end_logits))
        width = ids.shape[1]
        first_loss, last_loss = (
            nn.functional.cross_entropy(x, y, reduction="none", ignore_index=width)
            for x, y in ((starts, first), (ends, last))
        )
        far = torch.ones(width, width, dtype=torch.bool, device=ids.device).triu().tril(LONGEST - 1)
        best = (starts[:, :, None] + ends[:, None, :]).masked_fill(~far, -1e9).flatten(1).argmax(1)
        guesses = [self.words(row, int(b) // width, int(b) % width) for row, b in zip(ids, best, strict=True)]
        wanted = [self.words(*row) for row in zip(ids, first.tolist(), last.tolist(), strict=True)]
        return guesses, wanted, ((first_loss + last_loss) / 2).tolist()

    def words(self, ids: Tensor, first: int, last: int) -> str:
        """Return the text from token ``first`` to token ``last``."""
        text: str = self.processor.decode(ids[first : last + 1], skip_special_tokens=True)
        return text if first < len(ids) else CUT

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return answers(predictions, references)
