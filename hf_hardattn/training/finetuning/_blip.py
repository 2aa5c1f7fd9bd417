"""Shared code of the BLIP tasks: texts cut to the positions of the text tower, and features of a frozen vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoProcessor, BlipVisionModel, PreTrainedConfig

from ...errors import HardAttentionError
from ..arguments import flag
from ..features import FrozenFeatures, image_key
from ..loop import Task
from ._images import ImageArguments, ImageTask
from ._texts import pad_rows


@dataclass(kw_only=True)
class BlipArguments(ImageArguments):
    """Flags of all BLIP tasks."""

    output_dir: str = flag("outputs/blip", "Directory for the model, results.json, log.jsonl and checkpoints.")
    max_target_length: int = flag(64, "Maximum number of tokens of a text; longer texts are truncated.")
    vision_features: str | None = flag(
        None, "Run the frozen vision tower once per image and store its outputs in this safetensors file."
    )


class BlipTask(ImageTask):
    """Base class of the BLIP tasks."""

    families = ("blip",)
    Arguments = BlipArguments
    processor_class: ClassVar[Any] = AutoProcessor
    adapters = ("qkv", "query", "value")
    features: FrozenFeatures | None = None

    def build(self, config: PreTrainedConfig, processor: Any) -> None:
        super().build(config, processor)
        self.text_config, positions = config.text_config, config.text_config.max_position_embeddings
        if self.args.max_target_length > positions:
            raise HardAttentionError(
                f"max_target_length={self.args.max_target_length} is more than the {positions} positions of the text tower; longer "
                f"texts do not fit. Set --max_target_length to {positions} or less; longer texts are truncated."
            )

    def setup(self) -> Task:
        task = super().setup()
        if self.args.vision_features:
            tower = next(module for module in self.model.modules() if isinstance(module, BlipVisionModel))
            with self.accelerator.local_main_process_first():
                features = FrozenFeatures(Path(self.args.vision_features), self.model, tower)
                features.add(
                    self.accelerator, [batch for data in (task.train, task.validation) for batch in self._images(data)]
                )
            self.features = features
        return task

    def _images(self, data: Any) -> Iterator[tuple[list[str], Any]]:
        """Yield the images of a split in groups of up to 16: their keys, and a function that reads them."""
        for start in range(0, 0 if data is None else len(data), 16):
            rows = [data[i] for i in range(start, min(start + 16, len(data)))]
            yield [image_key(row[self.image]) for row in rows], partial(self._read, rows)

    def _read(self, rows: list[dict[str, Any]], places: list[int]) -> Tensor:
        return super().pixels([rows[i] for i in places])

    def pixels(self, rows: list[dict[str, Any]]) -> Tensor:
        if self.features is None:
            return super().pixels(rows)
        return self.features.of([image_key(row[self.image]) for row in rows])

    def encode(self, words: str, first: int, last: int | None) -> list[int]:
        """Token ids of a text between the special tokens ``first`` and ``last``, at most ``max_target_length`` in total."""
        ids: list[int] = self.processor.tokenizer.encode(words, add_special_tokens=False)
        end = [] if last is None else [last]
        return [first, *ids[: self.args.max_target_length - 1 - len(end)], *end]

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Padded token ids and their mask, both int64 ``[B, T]``."""
        return pad_rows(rows, self.text_config.pad_token_id), pad_rows([[1] * len(row) for row in rows], 0)
