"""Cluttered scenes: one labelled item among fragments of others, a task with a sparse signal.

Unless the scene says otherwise, the item is aligned with the patch grid, so that it fills whole patches. The fragments are crops of other
items of the same split at arbitrary pixels; the item's box covers them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import HardAttentionError


@dataclass(frozen=True)
class Scene:
    """Side lengths of squares in pixels: ``canvas`` is a multiple of ``patch``, and so is ``item`` if it is aligned with the grid;
    ``fragment`` is at most ``item``.

    Attributes:
        step: pixels between possible places of the item; None: ``patch``, the grid.
    """

    canvas: int
    patch: int
    item: int
    fragment: int
    step: int | None = None

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.canvas // self.patch


@dataclass(frozen=True)
class Bank:
    """The items of one split: ``images`` ``[C, D, item, item]`` in [0, ``white``] (C versions of D items), ``labels`` int64 ``[D]``."""

    images: Tensor
    labels: Tensor
    white: float = 1.0


def draw_scenes(bank: Bank, scene: Scene, size: int, clutter: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw ``size`` scenes with ``clutter`` fragments each.

    Args:
        bank: items, also for the fragments. scene: the sizes.
        size: images B, >= 1. clutter: fragments per image, >= 0; a training loop may increase it from call to call.
        generator: CPU generator; equal states give equal batches.

    Returns:
        ``pixel_values`` float32 ``[B, 1, canvas, canvas]`` in [-1, 1], ``labels`` int64 ``[B]``, and ``box`` int64 ``[B, 4]``: the
        patches (top, left, bottom, right) that the item touches, bottom and right exclusive.

    Raises:
        HardAttentionError: a size is out of range.
    """
    if size < 1 or clutter < 0:
        raise HardAttentionError(f"size={size}, clutter={clutter} is out of range; size must be >= 1 and clutter >= 0.")
    canvas, patch, side, fragment = scene.canvas, scene.patch, scene.item, scene.fragment
    copies, count = bank.images.shape[:2]
    step = scene.step or patch
    places = (canvas - side) // step + 1

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    item, top, left = draw(count, size), draw(places, size) * step, draw(places, size) * step
    image = torch.zeros(size, canvas * canvas)
    if clutter:
        other = (item[:, None] + 1 + draw(count - 1, size, clutter)) % count  # never the item itself
        source = draw(copies, size, clutter) * count + other
        free = side - fragment + 1
        corner = _flat(draw(free, size, clutter), draw(free, size, clutter), fragment, side)
        pixels = bank.images.view(-1)[source[..., None] * side * side + corner] / bank.white
        free = canvas - fragment + 1
        where = _flat(draw(free, size, clutter), draw(free, size, clutter), fragment, canvas)
        image.scatter_reduce_(1, where.view(size, -1), pixels.view(size, -1), "amax")
    pixels = bank.images[draw(copies, size), item] / bank.white
    image.scatter_(1, _flat(top, left, side, canvas), pixels.view(size, -1))
    return {
        "pixel_values": image.view(size, 1, canvas, canvas) * 2 - 1,
        "labels": bank.labels[item],
        "box": torch.stack([top // patch, left // patch, -(-(top + side) // patch), -(-(left + side) // patch)], 1),
    }


def patches_in_box(box: Tensor, grid: int) -> Tensor:
    """Mask bool ``[B, grid * grid]``, row by row, of the patches of a ``grid`` x ``grid`` canvas inside ``box`` int64 ``[B, 4]``."""
    places = torch.arange(grid)
    tall = (places >= box[:, :1]) & (places < box[:, 2:3])
    wide = (places >= box[:, 1:2]) & (places < box[:, 3:])
    return (tall[:, :, None] & wide[:, None, :]).flatten(1)


def _flat(top: Tensor, left: Tensor, side: int, width: int) -> Tensor:
    """Flat pixel indices ``[..., side * side]`` of squares at ``top``, ``left`` in an image ``width`` pixels wide."""
    inside = (torch.arange(side)[:, None] * width + torch.arange(side)).view(-1)
    return (top * width + left)[..., None] + inside
