"""What the tasks of encoders of texts share: BERT and its successors, each with a class of its own."""

from __future__ import annotations

from typing import Any, ClassVar

from accelerate import Accelerator
from transformers import AutoConfig

from ... import models
from ...errors import HardAttentionError
from ._texts import TokensTask


class EncoderTask(TokensTask):
    """A task of an encoder of texts.

    Class attributes:
        classes: the stock class of each configuration class.
    """

    family = "encoder"
    adapters = ("query", "value", "q_lin", "v_lin", "Wqkv")
    classes: ClassVar[Any]

    def __init__(self, args: Any, accelerator: Accelerator) -> None:
        super().__init__(args, accelerator)
        name = args.config_name or args.model_name_or_path
        if name is None:
            return  # the set-up says so
        config = AutoConfig.from_pretrained(name, revision=args.model_revision, cache_dir=args.cache_dir)
        if config.model_type not in encoders():
            task = type(self).__module__.rpartition(".")[2]
            raise HardAttentionError(
                f"{name} is a {config.model_type!r} model; {task} trains encoders of texts: {', '.join(encoders())}. Use the command of its "
                "family."
            )
        # in place of the Auto class, which builds no model from scratch
        self.__dict__["model_class"] = self.class_of(self.classes[type(config)])

    def class_of(self, stock: Any) -> Any:
        """The class that is trained."""
        return stock


def encoders() -> tuple[str, ...]:
    """The model types that read a text and classify it."""
    specs = {name: models.load(name).spec for name in models.names()}
    return tuple(
        name
        for name, spec in specs.items()
        if any(h.endswith("ForSequenceClassification") for h in spec.heads) and spec.towers[0].name == "text"
    )
