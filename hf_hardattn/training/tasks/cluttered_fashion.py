"""One garment among fragments of others, 84x84 pixels, 36 patches."""

from __future__ import annotations

from ..cluttered import Bank, Scene
from ..mnist import FASHION_NAMES, fashion_bank
from . import Recipe
from ._cluttered import Cluttered


class ClutteredFashion(Cluttered):
    """Name the garment: Fashion-MNIST on a canvas three times as wide; keep 9 of 36 patches, the garment fills 4.

    Args:
        folder: folder of the data set's files; see ``mnist.fashion_bank``.
    """

    names = FASHION_NAMES
    scene = Scene(canvas=84, patch=14, item=28, fragment=14)
    budget = 9 / 36
    recipe = Recipe(trunk_steps=2000, branch_steps=560, batch=32, ramp=2 / 3)

    def __init__(self, test_images: int = 2000, clutter: int = 8, folder: str | None = None) -> None:
        super().__init__(test_images, clutter)
        self.folder = folder

    def bank(self, split: str) -> Bank:
        return fashion_bank(split, self.folder)
