"""Shared code of the tasks for text encoders: BERT and its successors, each of which has its own class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import transformers
from accelerate import Accelerator
from transformers import AutoConfig

from ... import models
from ...errors import HardAttentionError
from ._texts import TokensTask


class EncoderTask(TokensTask):
    """Base class of the tasks for text encoders.

    Class attributes:
        classes: maps a model type to the name of its stock class.
    """

    families: ClassVar[tuple[str, ...]] = ("encoder",)
    adapters: ClassVar[tuple[str, ...]] = ("query", "value", "q_lin", "v_lin", "Wqkv")
    classes: ClassVar[Mapping[str, Any]]

    def __init__(self, args: Any, accelerator: Accelerator) -> None:
        super().__init__(args, accelerator)
        name = args.config_name or args.model_name_or_path
        if name is None:
            return  # setup() reports the missing name
        config = AutoConfig.from_pretrained(name, revision=args.model_revision, cache_dir=args.cache_dir)
        if config.model_type not in self.model_types():
            task = type(self).__module__.rpartition(".")[2]
            raise HardAttentionError(
                f"{name} is a {config.model_type!r} model; {task} trains {', '.join(self.model_types())}. Use the command of its "
                "family."
            )
        # replaces the Auto class, which cannot build a model from scratch
        self.__dict__["model_class"] = getattr(transformers, self.classes[config.model_type])

    @classmethod
    def trains(cls, architecture: str | None) -> bool:
        return architecture in {cls.classes[model_type] for model_type in cls.model_types()}

    @classmethod
    def model_types(cls) -> tuple[str, ...]:
        """Return the model types that the task trains."""
        return encoders()


def encoders() -> tuple[str, ...]:
    """Return the model types that have a text tower and a sequence classification head."""
    specs = (models.load(name).spec for name in models.names())
    heads = (head for spec in specs if spec.towers[0].name == "text" for head in spec.heads)
    # the name in the configuration may differ from that of the family: xlm-roberta
    return tuple(
        getattr(transformers, head).config_class.model_type
        for head in heads
        if head.endswith("ForSequenceClassification")
    )
