"""A low-resolution view of the whole image decides which patches are read at full resolution."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from ..options import Range, Width
from . import Projections, Scorer


class Scout(Scorer):
    """Score each patch from its pixels at low resolution and from its 3x3 neighbourhood: ``h = gelu(W1 x + b1)``,
    ``s = W2 gelu(h + depthwise3x3(h)) + b2``, x the averages of ``cells`` x ``cells`` cells of the patch.

    Nothing else reads the whole image: only the chosen patches are embedded and get their positions. With an int budget, the cost
    of the tower is therefore set by the budget, even for an image of 4,096 pixels a side. The scout itself costs ``C cells^2 + 10``
    times ``hidden`` multiplications per patch. It uses no positions, so it works with images of any size and shape.

    Args:
        hidden: width of the hidden layer, in [1, 8192].
        cells: side of the grid of averages that represents a patch, in [1, 256]; with 1, only the mean of the patch is read.

    Source: Katharopoulos & Fleuret 2019, "Processing Megapixel Images with Deep Attention-Sampling Models", arXiv:1905.03711, section 3
    (attention computed at low resolution, features only at the selected locations).
    """

    needs_positions = False
    needs_pixels = True

    def __init__(
        self,
        hidden_size: int,
        query_size: int,
        heads: int = 1,
        hidden: Width = 32,
        cells: Annotated[int, Range(1, 256, "A patch is reduced to cells x cells averages.")] = 4,
    ):
        super().__init__(hidden_size, query_size, heads)
        self.cells = cells
        self.weight_in = nn.Parameter(torch.empty(hidden, hidden_size, cells, cells))
        self.bias_in = nn.Parameter(torch.empty(hidden))
        self.kernel = nn.Parameter(torch.empty(hidden, 1, 3, 3))
        self.weight_out = nn.Parameter(torch.empty(heads, hidden))
        self.bias_out = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_in, std=self.hidden_size**-0.5 / self.cells)
        nn.init.zeros_(self.bias_in)
        nn.init.normal_(self.kernel, std=1 / 3)
        nn.init.normal_(self.weight_out, std=0.02)
        nn.init.zeros_(self.bias_out)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        """Map averages ``[B, C, rows * cells, columns * cells]`` to scores ``[B, H, prefix + patches, 1]``; the prefix rows get 0."""
        grid = nn.functional.conv2d(states.float(), self.weight_in.float(), self.bias_in.float(), stride=self.cells)
        grid = nn.functional.gelu(grid)
        grid = grid + nn.functional.conv2d(grid, self.kernel.float(), padding=1, groups=grid.shape[1])
        hidden = nn.functional.gelu(grid).flatten(2).transpose(1, 2)
        scores = nn.functional.linear(hidden, self.weight_out.float(), self.bias_out.float())
        return nn.functional.pad(scores, (0, 0, self.prefix, 0)).transpose(1, 2).unsqueeze(-1)
