"""Shared code of the cluttered tasks: a small ViT that selects patches before its first layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, PreTrainedConfig, ViTForImageClassification

from ..cluttered import Bank, Scene, draw_scenes, patches_in_box
from . import Base, Batch


class Cluttered(Base):
    """Name the class of the one whole item of a scene. Gold: the patches that the item fills.

    Args:
        test_images: size of the fixed test set, drawn from items that training never sees.
        clutter: fragments per image, reached over the ``ramp`` of the base checkpoint's training.
        layers, heads: layers and attention heads of the ViT, whose hidden size is 64.
    """

    model_class = ViTForImageClassification
    site = "vision.inputs"
    scene: ClassVar[Scene]
    names: ClassVar[tuple[str, ...]] = tuple("0123456789")  # class names

    def __init__(self, test_images: int = 2000, clutter: int = 12, layers: int = 2, heads: int = 2) -> None:
        self.test_images, self.clutter, self.layers, self.heads = test_images, clutter, layers, heads

    def bank(self, split: str) -> Bank:
        """Return the items of ``split``, ``"train"`` or ``"test"``."""
        raise NotImplementedError

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(
            "vit",
            hidden_size=64,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=128,
            image_size=self.scene.canvas,
            patch_size=self.scene.patch,
            num_channels=1,
            id2label=dict(enumerate(self.names)),
            label2id={name: label for label, name in enumerate(self.names)},
            hidden_dropout_prob=0.0,
        )

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        columns = draw_scenes(self.bank("train"), self.scene, size, int(self.clutter * difficulty), generator)
        return {name: columns[name] for name in ("pixel_values", "labels")}

    def columns(self) -> dict[str, Tensor]:
        """Return the whole test set, with ``box``."""
        draw = torch.Generator().manual_seed(1234)
        return draw_scenes(self.bank("test"), self.scene, self.test_images, self.clutter, draw)

    def test(self) -> Iterator[Batch]:
        columns = self.columns()
        gold = pad(patches_in_box(columns["box"], self.scene.grid), (1, 0))[:, None]  # CLS is first and never gold
        for pixels, labels, inside in zip(
            *(part.split(250) for part in (columns["pixel_values"], columns["labels"], gold)), strict=True
        ):
            yield Batch({"pixel_values": pixels, "labels": labels}, inside)
