"""Classify texts with BERT and its successors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from ... import models
from ...errors import HardAttentionError
from ..arguments import flag
from ._text_classes import TextClassArguments, TextClasses


@dataclass(kw_only=True)
class EncoderClassArguments(TextClassArguments):
    """Flags of text classification with an encoder."""

    output_dir: str = flag("outputs/encoder", "Where the model, results.json, log.jsonl and checkpoints go.")


class SequenceClassification(TextClasses):
    """Classify texts with an encoder, by its first token."""

    family = "encoder"
    first = True
    model_class = AutoModelForSequenceClassification
    Arguments = EncoderClassArguments
    heads = ("classifier", "pre_classifier", "pooler")
    adapters = ("query", "value", "q_lin", "v_lin", "Wqkv")

    def __init__(self, args: Any, accelerator: Accelerator) -> None:
        super().__init__(args, accelerator)
        name = args.config_name or args.model_name_or_path
        if name is None:
            return  # the set-up says so
        config = AutoConfig.from_pretrained(name, revision=args.model_revision, cache_dir=args.cache_dir)
        if config.model_type not in encoders():
            raise HardAttentionError(
                f"{name} is a {config.model_type!r} model; sequence_classification trains encoders of texts: {', '.join(encoders())}. Use the "
                "command of its family."
            )
        # in place of the Auto class, which builds no model from scratch
        self.__dict__["model_class"] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]


def encoders() -> tuple[str, ...]:
    """The model types that read a text and classify it."""
    specs = {name: models.load(name).spec for name in models.names()}
    return tuple(
        name
        for name, spec in specs.items()
        if any(h.endswith("ForSequenceClassification") for h in spec.heads) and spec.towers[0].name == "text"
    )
