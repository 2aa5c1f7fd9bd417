"""Cluttered digits: one real handwritten digit among fragments of others, a task whose signal is sparse.

The digits are scikit-learn's 1,797 real 8x8 images (``load_digits``), enlarged to 16x16. One lies on a 64x64 canvas with its
top-left corner on the 8-pixel patch grid, so that it fills exactly 4 of the 64 patches; ``clutter`` fragments, 8x8 crops of
other digits of the same split, lie at arbitrary pixels, under the digit's box where they meet it. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import HardAttentionError, missing_extra, unknown

CANVAS, PATCH, DIGIT, FRAGMENT = 64, 8, 16, 8  # pixels
GRID = CANVAS // PATCH  # patches per side
SPLITS = ("train", "test")
WARPS = 16  # slightly rotated, scaled and shifted copies of each training digit


@dataclass(frozen=True)
class DigitBank:
    """The digits of one split: ``images`` float32 ``[C, D, 16, 16]`` in [0, 1] (C warped copies of D digits), ``labels`` int64 ``[D]``."""

    images: Tensor
    labels: Tensor


@cache
def digit_bank(split: str) -> DigitBank:
    """Return the digits of ``split``: the last quarter of each class, in the file's order, is test, the rest is train.

    The split is by digit image, so no test digit, nor a fragment of one, is ever seen in training. Training digits come as
    ``WARPS`` copies, each warped by a fixed small affine map; the first copy, and the only one in test, is not warped.

    Raises:
        HardAttentionError: no such split.
        ImportError: scikit-learn is not installed; the message names the extra that brings it.
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
    copies = [_enlarge(images, torch.zeros(len(index), 4))]
    if split == "train":
        draw = torch.Generator().manual_seed(0)
        copies += [_enlarge(images, torch.rand(len(index), 4, generator=draw) * 2 - 1) for _ in range(WARPS - 1)]
    return DigitBank(torch.stack(copies), labels)


def _enlarge(images: Tensor, warp: Tensor) -> Tensor:
    """Enlarge ``[D, 1, 8, 8]`` to ``[D, 16, 16]`` (bilinear); ``warp`` ``[D, 4]`` in [-1, 1] spans +-12 degrees, +-12 % size, +-1 pixel."""
    angle, scale, shift = warp[:, 0] * 0.21, 1 + 0.12 * warp[:, 1], warp[:, 2:] * 0.125
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, [len(images), 1, DIGIT, DIGIT], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="zeros").squeeze(1)


def sample_batch(split: str, size: int, clutter: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw ``size`` images of ``split`` with ``clutter`` fragments each (about 35,000 images/s on one core at 16 fragments).

    Args:
        split: ``"train"`` or ``"test"``.
        size: images B, >= 1.
        clutter: fragments per image, >= 0; a training loop may ramp it up from call to call.
        generator: CPU generator; equal states give equal batches.

    Returns:
        ``pixel_values`` float32 ``[B, 1, 64, 64]`` in [-1, 1], ``labels`` int64 ``[B]``, and ``box`` int64 ``[B, 4]``: the digit's
        (top, left, bottom, right) in patches, bottom and right exclusive.
    """
    if size < 1 or clutter < 0:
        raise HardAttentionError(f"size={size}, clutter={clutter} is out of range; size is >= 1 and clutter >= 0.")
    bank = digit_bank(split)
    copies, count = bank.images.shape[:2]

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    digit, top, left = draw(count, size), draw(GRID - 1, size), draw(GRID - 1, size)
    canvas = torch.zeros(size, CANVAS * CANVAS)
    if clutter:
        other = (digit[:, None] + 1 + draw(count - 1, size, clutter)) % count  # never the digit itself
        source = draw(copies, size, clutter) * count + other
        corner = _flat(
            draw(DIGIT - FRAGMENT + 1, size, clutter), draw(DIGIT - FRAGMENT + 1, size, clutter), FRAGMENT, DIGIT
        )
        pixels = bank.images.view(-1)[source[..., None] * DIGIT * DIGIT + corner]
        where = _flat(
            draw(CANVAS - FRAGMENT + 1, size, clutter), draw(CANVAS - FRAGMENT + 1, size, clutter), FRAGMENT, CANVAS
        )
        canvas.scatter_reduce_(1, where.view(size, -1), pixels.view(size, -1), "amax")
    image = bank.images[draw(copies, size), digit]
    canvas.scatter_(1, _flat(top * PATCH, left * PATCH, DIGIT, CANVAS), image.view(size, -1))
    return {
        "pixel_values": canvas.view(size, 1, CANVAS, CANVAS) * 2 - 1,
        "labels": bank.labels[digit],
        "box": torch.stack([top, left, top + DIGIT // PATCH, left + DIGIT // PATCH], 1),
    }


def _flat(top: Tensor, left: Tensor, side: int, width: int) -> Tensor:
    """Flat pixel indices ``[..., side * side]`` of squares at ``top``, ``left`` in an image ``width`` pixels wide."""
    inside = (torch.arange(side)[:, None] * width + torch.arange(side)).view(-1)
    return (top * width + left)[..., None] + inside


class ClutteredDigits(Dataset[dict[str, Any]]):
    """A fixed set of ``size`` cluttered digits, equal for equal ``seed``; items as ``sample_batch`` without the batch axis."""

    def __init__(self, split: str = "train", size: int = 2000, clutter: int = 12, seed: int = 0) -> None:
        self.columns = sample_batch(split, size, clutter, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}
