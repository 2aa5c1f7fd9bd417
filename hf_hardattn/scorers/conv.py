"""A small MLP that also reads the neighbouring patches."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from ..errors import HardAttentionError
from ..options import Range, Width
from . import Projections, Scorer


class Conv(Scorer):
    """Score each patch from itself and its 3x3 neighbourhood: ``h = gelu(W1 norm(x) + b1)``, ``s = W2 gelu(h + depthwise3x3(h)) + b2``.

    At ``vision.inputs`` no layer has mixed the patches yet, so a single patch does not show whether it belongs to the object or to
    clutter, but its neighbours do. Rows before the patches (CLS) get a score of 0. A video is a row of frames, each of which is a grid.

    Args:
        hidden: width of the hidden layer, in [1, 8192].
        frames: F, the number of frames of a video, in [1, 65536].
        whole_frames: give all patches of a frame its mean score, so that a budget of whole frames (a share k/F) keeps k of them.
            Choose patches within the frames at the next site, ``vision.tokens.0``. Choices that are drawn rather than sorted
            (``sample=True`` of some estimators) may split a frame in training.

    Raises:
        HardAttentionError: the patches form neither the grid of the image nor a square.

    Cost: (D + 10) * hidden multiplications per patch.
    """

    needs_positions = False
    needs_grid = True

    def __init__(
        self,
        hidden_size: int,
        query_size: int,
        heads: int = 1,
        hidden: Width = 64,
        frames: Annotated[int, Range(1, 65_536)] = 1,
        whole_frames: bool = False,
    ):
        super().__init__(hidden_size, query_size, heads)
        self.frames, self.whole_frames = frames, whole_frames
        self.weight_in = nn.Parameter(torch.empty(hidden, hidden_size))
        self.bias_in = nn.Parameter(torch.empty(hidden))
        self.kernel = nn.Parameter(torch.empty(hidden, 1, 3, 3))
        self.weight_out = nn.Parameter(torch.empty(heads, hidden))
        self.bias_out = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight_in, std=self.hidden_size**-0.5)
        nn.init.zeros_(self.bias_in)
        nn.init.normal_(self.kernel, std=1 / 3)
        nn.init.normal_(self.weight_out, std=0.02)
        nn.init.zeros_(self.bias_out)

    def keys(self, states: Tensor, positions: Tensor, projections: Projections | None = None) -> Tensor:
        batch, n, _ = states.shape
        rows, columns = self._grid(n - self.prefix, None if projections is None else projections.grid)
        patches = nn.functional.rms_norm(states[:, self.prefix :].float(), (self.hidden_size,))
        hidden = nn.functional.gelu(nn.functional.linear(patches, self.weight_in.float(), self.bias_in.float()))
        grid = hidden.unflatten(1, (self.frames, -1)).flatten(0, 1).transpose(1, 2).unflatten(2, (rows, columns))
        grid = grid + nn.functional.conv2d(grid, self.kernel.float(), padding=1, groups=grid.shape[1])
        hidden = nn.functional.gelu(grid).flatten(2).transpose(1, 2).reshape(batch, n - self.prefix, -1)
        scores = nn.functional.linear(hidden, self.weight_out.float(), self.bias_out.float())
        if self.whole_frames:
            shared = scores.unflatten(1, (self.frames, -1)).mean(2, keepdim=True)
            scores = shared.expand(-1, -1, rows * columns, -1).flatten(1, 2)
        return nn.functional.pad(scores, (0, 0, self.prefix, 0)).transpose(1, 2).unsqueeze(-1)

    def _grid(self, patches: int, known: tuple[int, int] | None) -> tuple[int, int]:
        """Return the number of patches down and across each frame: those of the image, or a square if the image is not known."""
        if known is not None and known[0] * known[1] * self.frames == patches:
            return known
        side = math.isqrt(patches // self.frames)
        if side * side * self.frames != patches:
            frames = f"scorer_options {{'frames': {self.frames}}}" if self.frames > 1 else "one frame"
            raise HardAttentionError(
                f"scorer 'conv' got {patches} patches for {frames}; it needs a grid for each frame. Pass pixel_values, set frames to the "
                "number in a video, or use scorer 'mlp'."
            )
        return side, side
