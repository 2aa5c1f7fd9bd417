"""One handwritten digit among fragments of others, 64x64 pixels, 64 patches."""

from __future__ import annotations

from ..cluttered import Bank
from ..cluttered_digits import SCENE, digit_bank
from . import Recipe
from ._cluttered import Cluttered


class ClutteredDigits(Cluttered):
    """Name the digit: scikit-learn's real digits on a 64x64 canvas; keep 9 of 64 patches, the digit fills 4."""

    scene = SCENE
    budget = 9 / 64
    recipe = Recipe(trunk_steps=1100, branch_steps=350, batch=32, ramp=2 / 3)

    def bank(self, split: str) -> Bank:
        return digit_bank(split, self.scene.item)
