"""One MNIST digit anywhere in a larger image, alone or among clutter: the setting of Recurrent Models of Visual Attention."""

from __future__ import annotations

from ..cluttered import Bank, Scene
from ..mnist import mnist_bank
from . import Recipe
from ._cluttered import Cluttered

PATCH = {60: 12, 100: 10}


class TranslatedDigits(Cluttered):
    """Name the digit from 8 glimpses, which are patches here: 12 pixels wide on a canvas of 60 pixels, 10 on one of 100.

    This is the published setting without the coarser rings around a glimpse.

    Args:
        canvas: 60 or 100 pixels per side. clutter: fragments of 8x8 pixels per image; the paper uses none, or some.
        folder: folder of the digits; see ``mnist.mnist_bank``.

    Source: Mnih et al. 2014, arXiv:1406.6247, section 4.1.
    """

    scorer = "recurrent"
    scorer_options = {"glimpses": 8}
    budget = 8 / 25
    samples = 8
    recipe = Recipe(trunk_steps=1500, branch_steps=500, batch=32, ramp=0.3)

    def __init__(self, canvas: int = 60, clutter: int = 0, test_images: int = 10000, folder: str | None = None) -> None:
        self.scene = Scene(canvas=canvas, patch=PATCH[canvas], item=28, fragment=8, step=1)  # type: ignore[misc]  # set per instance here
        super().__init__(test_images, clutter, layers=2, heads=4)
        self.folder = folder

    def bank(self, split: str) -> Bank:
        return mnist_bank(split, self.folder)
