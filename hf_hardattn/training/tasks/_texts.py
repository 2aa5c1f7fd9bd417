"""Shared code of the tasks on real sentences: files that a script prepares, a tokenizer among them, and BLEU of the output."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ...errors import HardAttentionError
from ..metrics import bleu
from . import Base


class Texts(Base):
    """A task on ``{train,test,validation}.jsonl`` and ``tokenizer.json`` in a folder; BLEU and chrF in [0, 100].

    Class attributes:
        place: the default folder. variable: environment variable that names another folder.
        maker: command that creates the folder, up to ``--output``.

    Args:
        folder: folder of the files. split: the split to test on. Tune on ``validation``.
    """

    place: ClassVar[str]
    variable: ClassVar[str]
    maker: ClassVar[str]
    metric = "bleu"
    points = 1.0

    def __init__(self, folder: str | None = None, split: str = "test") -> None:
        self.folder, self.split = folder or os.environ.get(self.variable) or self.place, split

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which appends ``</s>`` to each text."""
        return _tokenizer(self.file("tokenizer.json"))

    def file(self, name: str) -> str:
        """Return the path of a file in the folder.

        Raises:
            HardAttentionError: the file does not exist.
        """
        path = Path(self.folder) / name
        if not path.is_file():
            raise HardAttentionError(
                f"{path} does not exist; the task '{type(self).__module__.rpartition('.')[2]}' reads the output of a script. Create it with: "
                f"{self.maker} --output {self.folder}; or set ${self.variable} to its folder."
            )
        return str(path)

    def processor(self) -> PreTrainedTokenizerFast:
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, **special)

    def texts(self, ids: Tensor) -> list[str]:
        """Decode token ids ``[B, T]`` to sentences; negative ids are padding."""
        return self.tokenizer.decode_batch(ids.clamp(min=0).tolist(), skip_special_tokens=True)

    def references(self, inputs: dict[str, Tensor]) -> list[str]:
        return self.texts(inputs["labels"])

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return bleu(predictions, references)


@cache
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.from_file(path)
