"""Classify texts with T5."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import T5ForSequenceClassification

from ..arguments import flag
from ._text_classes import TextClassArguments, TextClasses
from ._texts import T5Task


@dataclass(kw_only=True)
class T5ClassArguments(TextClassArguments):
    """Flags of text classification with T5."""

    output_dir: str = flag("outputs/t5", "Where the model, results.json, log.jsonl and checkpoints go.")


class TextClassification(TextClasses, T5Task):
    """Classify texts with an encoder and a decoder."""

    model_class = T5ForSequenceClassification
    Arguments = T5ClassArguments
    heads = ("classification_head",)
