"""One handwritten digit somewhere in a large image strewn with fragments of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from ..cluttered import Bank, Scene, draw_scenes, patches_in_box
from ..cluttered_digits import digit_bank
from . import TEST_SEED, Batch, Recipe
from ._cluttered import Cluttered

TRAINED = 256  # pixels per side that the position embeddings are learned for
PIXELS = 2**22  # pixels of a test batch


class Needle(Cluttered):
    """Name the digit, which fills one patch of 32 pixels: scikit-learn's real digits, 1 of 64 patches at 256 pixels per side, 1 of 16,384
    at 4,096. The density of the fragments is the same at every size, and so is the number of kept patches if the budget is a count.

    Args:
        canvas: pixels per side. test_images: size of the fixed test set. density: fragments per patch.
    """

    scorer = "scout"
    scorer_options = {"cells": 8}  # cells of 4 pixels: the resolution of the digits before they were enlarged
    budget = 8 / 64
    one_is_enough = True
    recipe = Recipe(trunk_steps=700, branch_steps=250, batch=32, ramp=2 / 3)

    def __init__(self, canvas: int = TRAINED, test_images: int = 1000, density: float = 0.5) -> None:
        self.scene = Scene(canvas=canvas, patch=32, item=32, fragment=16)  # type: ignore[misc]  # set per instance here
        super().__init__(test_images, clutter=int(density * self.scene.grid**2))

    def bank(self, split: str) -> Bank:
        return digit_bank(split, self.scene.item)

    def config(self) -> PreTrainedConfig:
        config = super().config()
        config.image_size = TRAINED
        return config

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Any]:
        return {**super().draw(size, generator, difficulty), **self._places()}

    def test(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(TEST_SEED)
        most = max(1, PIXELS // self.scene.canvas**2)
        for start in range(0, self.test_images, most):
            count = min(most, self.test_images - start)
            columns = draw_scenes(self.bank("test"), self.scene, count, self.clutter, generator)
            gold = pad(patches_in_box(columns.pop("box"), self.scene.grid), (1, 0))[:, None]
            yield Batch({**columns, **self._places()}, gold)

    def _places(self) -> dict[str, Any]:
        return {"interpolate_pos_encoding": True} if self.scene.canvas != TRAINED else {}
