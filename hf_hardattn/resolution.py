"""Two resolutions: the whole image is seen coarsely, and patches are embedded only where that look chose them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import HardAttentionError
from .selector import Selector
from .stream import Made, Stream, as_keys, required_rows


@dataclass
class Embedded:
    """What Hard embeddings hand to a tower's layers in place of a tensor: CLS and the patches they embedded, and the stream that these begin.

    Transformers' code in between reads no more than ``shape``, ``dtype`` and ``device``.

    Attributes:
        rows: ``[B, 1 + K, D]``. stream, made: of the choice. length: 1 + N, rows of the whole image.
    """

    rows: Tensor
    stream: Stream
    made: Made
    length: int

    def refuse(self, mask: Tensor | None) -> None:
        """Refuse an attention mask over rows that were chosen before anybody could ask it.

        Raises:
            HardAttentionError: there is a mask.
        """
        if mask is not None:
            raise HardAttentionError(
                f"attention_mask, and the scorer at '{self.made[0].site}' reads pixels; it chooses patches before the mask is known. Pass no "
                "attention_mask, or use scorer 'conv', which chooses among embedded patches."
            )

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device


@dataclass
class Chosen:
    """A choice among the patches of images.

    Attributes:
        patches: int64 ``[B, K]``, row by row from 0; None: embed them all. grid: patches down and across.
    """

    stream: Stream
    made: Made
    patches: Tensor | None
    grid: tuple[int, int]

    def embedded(self, rows: Tensor) -> Embedded:
        """With the rows that were embedded, CLS first."""
        return Embedded(rows, self.stream, self.made, 1 + self.grid[0] * self.grid[1])


class PatchSite:
    """Mixin of every Hard class of patch embeddings: hosts the selector of a scorer that reads pixels."""

    input_selector: Selector | None

    def scouting(self) -> Selector | None:
        return self.input_selector if self.input_selector is not None and self.input_selector.enabled else None

    def choose(self, selector: Selector, pixels: Tensor, size: tuple[int, int]) -> Chosen:
        """Choose among the patches of ``pixels`` ``[B, C, height, width]``; ``size``: of a patch."""
        batch, grid = len(pixels), (pixels.shape[-2] // size[0], pixels.shape[-1] // size[1])
        shape = batch, 1 + grid[0] * grid[1]
        cells = selector.scorer.cells
        whole = pixels[..., : grid[0] * size[0], : grid[1] * size[1]]
        coarse = nn.functional.adaptive_avg_pool2d(whole, (grid[0] * cells, grid[1] * cells))
        means = nn.functional.avg_pool2d(coarse, cells).flatten(2).transpose(1, 2)
        context = selector.context(nn.functional.pad(means, (0, 0, 1, 0)))
        required = required_rows("first", shape, None, pixels.device)
        selection = selector(selector.keys(coarse), None, as_keys(required), context=context)
        stream, indices = Stream().after(selector, selection, shape)
        # CLS is kept always, and first
        return Chosen(stream, Made([selection]), None if indices is None else indices[:, 1:] - 1, grid)


def embed_patches(projection: nn.Module, pixels: Tensor, patches: Tensor, size: tuple[int, int]) -> Tensor:
    """What the convolution ``projection``, whose stride is its kernel, gives at some patches, and nothing computed elsewhere.

    Args:
        pixels: ``[B, C, height, width]``. patches: int64 ``[B, K]``, row by row. size: of a patch.

    Returns:
        ``[B, K, D]``.
    """
    tiles = pixels.unfold(2, size[0], size[0]).unfold(3, size[1], size[1]).permute(0, 2, 3, 1, 4, 5)  # a view
    across = tiles.shape[2]
    batch = torch.arange(len(pixels), device=pixels.device).unsqueeze(-1)
    found = tiles[batch, patches // across, patches % across]  # [B, K, C, h, w]
    if type(projection) is nn.Conv2d:
        return nn.functional.linear(found.flatten(2), projection.weight.flatten(1), projection.bias)
    # an adapter wraps the convolution: ask it for each patch as for an image, or its part would be lost
    rows: Any = projection(found.flatten(0, 1))
    return rows.flatten(1).unflatten(0, patches.shape)


def embed_positions(table: Tensor, patches: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Position embeddings of CLS and of some patches, ``[B, 1 + K, D]``.

    Bicubic interpolation is separable: the weights of a place are those of its row times those of its column, and PyTorch's own come out
    of interpolating unit vectors. Equal to Transformers' ``interpolate_pos_encoding`` up to the order of its sums.

    Args:
        table: learned embeddings ``[1, 1 + P, D]``, CLS first, of a square of patches.
        patches: int64 ``[B, K]``. grid: patches down and across of these images; None: the table's own, nothing is interpolated.
    """
    first, learned = table[:, :1].expand(len(patches), -1, -1), table[0, 1:]
    side = math.isqrt(len(learned))
    if grid is None or grid == (side, side):
        return torch.cat((first, learned[patches]), 1)
    unit = torch.eye(side, device=table.device)[None, :, :, None]
    down, across = (
        nn.functional.interpolate(unit, size=(n, 1), mode="bicubic", align_corners=False)[0, :, :, 0].t() for n in grid
    )
    weights = down[patches // grid[1]].unsqueeze(-1) * across[patches % grid[1]].unsqueeze(-2)  # [B, K, side, side]
    return torch.cat((first, (weights.flatten(-2) @ learned.float()).to(table.dtype)), 1)
