"""What the two tasks of question answering share: rows in SQuAD's form or with plain answers."""

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

    output_dir: str = flag("outputs/t5", "Where the model, results.json, log.jsonl and checkpoints go.")
    question_column: str | None = flag(None, "Column of questions: question by default.")
    context_column: str | None = flag(None, "Column of the texts that hold the answers: context by default.")
    answer_column: str | None = flag(
        None, "Column of answers, texts or SQuAD's dicts of text and answer_start: answers, answer by default."
    )
    max_source_length: int = flag(512, "Tokens of question and context together, at most; longer ones are cut.")


def prompt(question: str) -> str:
    """What stands before the context, as the pretrained T5 reads it."""
    return f"question: {question} context: "


def answer(row: dict[str, Any], name: str) -> tuple[str, int | None]:
    """The first answer of a row, and the character of the context where it starts, if the row tells.

    Raises:
        HardAttentionError: there is none.
    """
    value = row[name]
    if isinstance(value, dict):
        texts, starts = value.get("text") or [], value.get("answer_start") or []
        if not texts:
            raise HardAttentionError(
                f"{name}={value!r} holds no answer; every row needs one, unanswerable questions cannot be trained here. Take the row out."
            )
        return texts[0], int(starts[0]) if starts else None
    return text(row, name), None
