"""Shared code of the two question answering tasks: rows in the format of SQuAD, or with plain answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import HardAttentionError
from ..arguments import flag
from ..rows import text
from . import TaskArguments


@dataclass(kw_only=True)
class AnswerArguments(TaskArguments):
    """Flags of question answering."""

    output_dir: str = flag("outputs/t5", "Directory for the model, results.json, log.jsonl and checkpoints.")
    question_column: str | None = flag(None, "Column of questions: question by default.")
    context_column: str | None = flag(None, "Column of the texts that contain the answers: context by default.")
    answer_column: str | None = flag(
        None, "Column of answers (texts, or SQuAD's dicts of text and answer_start): answers or answer by default."
    )
    max_source_length: int = flag(
        512, "Maximum number of tokens of question and context together; longer ones are truncated."
    )


def prompt(question: str) -> str:
    """Return the text before the context, in the format that T5 was pretrained on."""
    return f"question: {question} context: "


def answer(row: dict[str, Any], name: str) -> tuple[str, int | None]:
    """Return the first answer of a row, and the character of the context where it starts, or None if the row does not say.

    Raises:
        HardAttentionError: the row has no answer.
    """
    value = row[name]
    if isinstance(value, dict):
        texts, starts = value.get("text") or [], value.get("answer_start") or []
        if not texts:
            raise HardAttentionError(
                f"{name}={value!r} holds no answer; every row needs one, because unanswerable questions are not supported. Remove the row."
            )
        return texts[0], int(starts[0]) if starts else None
    return text(row, name), None
