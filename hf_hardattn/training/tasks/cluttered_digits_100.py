"""One handwritten digit among fragments of others, 100x100 pixels, 100 patches."""

from __future__ import annotations

from ..cluttered import Bank
from ..cluttered_digits import LARGE, digit_bank
from . import Recipe
from ._cluttered import Cluttered


class ClutteredDigits100(Cluttered):
    """Name the digit: scikit-learn's real digits on a 100x100 canvas; keep 12 of 100 patches, the digit fills 4."""

    scene = LARGE
    budget = 12 / 100
    recipe = Recipe(trunk_steps=1200, branch_steps=400, batch=32, ramp=2 / 3)

    def __init__(self, test_images: int = 2000, clutter: int = 20) -> None:
        super().__init__(test_images, clutter)

    def bank(self, split: str) -> Bank:
        return digit_bank(split, self.scene.item)
