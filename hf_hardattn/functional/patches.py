"""Images as grids of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def replace_patches(pixels: Tensor, dropped: Tensor, size: tuple[int, int], how: str, seed: int) -> Tensor:
    """Replace the dropped patches of images ``[B, C, height, width]``; ``dropped``: bool ``[B, 1 + patches]`` with CLS first."""
    batch, channels, height, width = pixels.shape
    rows, columns = height // size[0], width // size[1]
    image = dropped[:, 1:].view(batch, 1, rows, columns).repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    image = nn.functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))
    if how == "noise":
        other = noise_like(pixels, seed)
    elif how == "zero":
        other = torch.zeros_like(pixels)
    else:
        other = pixels.roll((size[0], size[1]), (2, 3))
    return torch.where(image, other, pixels)


def noise_like(values: Tensor, seed: int) -> Tensor:
    """Return normal noise of the shape and dtype of ``values`` that is nowhere equal to them, even if they were drawn from the same seed."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)).to(values)
    return torch.where(noise == values, noise + 1, noise)
