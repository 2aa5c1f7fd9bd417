"""One handwritten digit among fragments of others, 60x60 pixels, 36 patches."""

from __future__ import annotations

from ..cluttered import Bank
from ..cluttered_digits import SMALL, digit_bank
from . import Recipe
from ._cluttered import Cluttered


class ClutteredDigits60(Cluttered):
    """Name the digit: scikit-learn's real digits on a 60x60 canvas; keep 9 of 36 patches, the digit fills 4."""

    scene = SMALL
    budget = 9 / 36
    recipe = Recipe(trunk_steps=1100, branch_steps=350, batch=32, ramp=2 / 3)

    def __init__(self, test_images: int = 2000, clutter: int = 7) -> None:
        super().__init__(test_images, clutter)

    def bank(self, split: str) -> Bank:
        return digit_bank(split, self.scene.item)
