"""Answer questions about a text by generating the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..arguments import flag
from ..metrics import score_texts
from ..rows import text
from ..sources import column
from ._questions import AnswerArguments, answer, prompt
from ._texts import TextToText


@dataclass(kw_only=True)
class GenerativeArguments(AnswerArguments):
    """Flags of generative question answering."""

    max_target_length: int = flag(32, "Maximum number of tokens of an answer; longer answers are truncated.")
    num_beams: int = flag(1, "Beams in evaluation.")
    metrics: list[str] = flag(["answers"], "answers (exact match and word F1) | rouge | bleu")


class GenerativeQuestionAnswering(TextToText):
    """A question, a context and an answer column."""

    Arguments = GenerativeArguments

    def columns(self, data: Dataset) -> None:
        args = self.args
        self.question = column(data, args.question_column, ("question",), "--question_column")
        self.context = column(data, args.context_column, ("context",), "--context_column")
        self.answer = column(data, args.answer_column, ("answers", "answer"), "--answer_column")
        score_texts(args.metrics, ["a"], ["a"])  # a missing package raises now, not after the training

    def pair(self, row: dict[str, Any]) -> tuple[str, str]:
        return prompt(text(row, self.question)) + text(row, self.context), answer(row, self.answer)[0]
