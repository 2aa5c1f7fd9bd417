"""Cluttered digits: one real handwritten digit among fragments of others.

The digits are scikit-learn's 1,797 real 8x8 images (``load_digits``), enlarged to 16x16 pixels on a 64x64 canvas of 8-pixel patches, or
to 20x20 pixels on 60x60 or 100x100 with 10-pixel patches; in each case the digit fills exactly 4 patches. Nothing is downloaded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import missing_extra, unknown
from .cluttered import Bank, Scene, draw_scenes

SMALL = Scene(canvas=60, patch=10, item=20, fragment=10)
SCENE = Scene(canvas=64, patch=8, item=16, fragment=8)
LARGE = Scene(canvas=100, patch=10, item=20, fragment=10)
SPLITS = ("train", "test")
WARPS = 16  # slightly rotated, scaled and shifted copies of each training digit


@cache
def digit_bank(split: str, side: int = SCENE.item) -> Bank:
    """Return the digits of ``split``, ``side`` pixels per side. The last quarter of each class, in the file's order, is the test split.

    All other digits are the training split, so training never sees a test digit or a fragment of one. Each training digit has ``WARPS``
    copies, each warped by a fixed small affine map; the first copy, which is the only one in the test split, is not warped.

    Raises:
        HardAttentionError: no such split.
        ImportError: scikit-learn is not installed; the message names the extra that installs it.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_extra("scikit-learn", "demo", "the cluttered digits data set") from error
    pixels, targets = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(targets, dtype=torch.int64)
    chosen = []
    for label in range(10):
        members = (labels == label).nonzero().squeeze(1)
        cut = len(members) * 3 // 4
        chosen.append(members[:cut] if split == "train" else members[cut:])
    index = torch.cat(chosen).sort().values
    images, labels = images[index], labels[index]
    copies = [_enlarge(images, torch.zeros(len(index), 4), side)]
    if split == "train":
        draw = torch.Generator().manual_seed(0)
        copies += [_enlarge(images, torch.rand(len(index), 4, generator=draw) * 2 - 1, side) for _ in range(WARPS - 1)]
    return Bank(torch.stack(copies), labels)


def _enlarge(images: Tensor, warp: Tensor, side: int) -> Tensor:
    """Enlarge ``[D, 1, 8, 8]`` to ``[D, side, side]`` (bilinear); ``warp`` ``[D, 4]`` in [-1, 1] spans +-12 degrees, +-12 % size, +-1/16 of the side."""
    angle, scale, shift = warp[:, 0] * 0.21, 1 + 0.12 * warp[:, 1], warp[:, 2:] * 0.125
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, [len(images), 1, side, side], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="zeros").squeeze(1)


def sample_batch(
    split: str, size: int, clutter: int, generator: torch.Generator, scene: Scene = SCENE
) -> dict[str, Tensor]:
    """Draw ``size`` images of ``split`` (about 35,000 images/s on one core at 16 fragments); see ``cluttered.draw_scenes``.

    Raises:
        HardAttentionError: no such split, or a size is out of range.
    """
    return draw_scenes(digit_bank(split, scene.item), scene, size, clutter, generator)


class ClutteredDigits(Dataset[dict[str, Any]]):
    """A fixed set of ``size`` cluttered digits, equal for equal ``seed``; items are those of ``sample_batch`` without the batch axis."""

    def __init__(
        self, split: str = "train", size: int = 2000, clutter: int = 12, seed: int = 0, scene: Scene = SCENE
    ) -> None:
        self.columns = sample_batch(split, size, clutter, torch.Generator().manual_seed(seed), scene)

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}
