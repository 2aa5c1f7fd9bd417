"""Classify texts with BERT and its successors."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from ..arguments import flag
from ._encoders import EncoderTask
from ._text_classes import TextClassArguments, TextClasses


@dataclass(kw_only=True)
class EncoderClassArguments(TextClassArguments):
    """Flags of text classification with an encoder."""

    output_dir: str = flag("outputs/encoder", "Where the model, results.json, log.jsonl and checkpoints go.")


class SequenceClassification(EncoderTask, TextClasses):
    """Classify texts with an encoder, by its first token."""

    first = True
    model_class = AutoModelForSequenceClassification
    classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    Arguments = EncoderClassArguments
    heads = ("classifier", "pre_classifier", "pooler")
