"""Images with the kept patches lit and the dropped ones dimmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import missing_extra
from ..selection import Selection


def patch_overlay(
    pixel_values: Tensor,
    selection: Selection,
    patch_size: int,
    titles: Sequence[str] = (),
    columns: int = 6,
    caption: str = "",
) -> Any:
    """Draw images with the patches that a ``vision`` site kept lit, the others dimmed, and a frame around each kept patch.

    Args:
        pixel_values: ``[B, C, height, width]``, C = 1 or 3, any range (each image is stretched to its own).
        selection: of ``vision.inputs`` or ``vision.tokens.L`` for the same batch, CLS first.
        patch_size: pixels.
        titles: one a image. columns: images a row. caption: below the figure.

    Returns:
        matplotlib figure; ``figure.savefig("kept.png")``.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise missing_extra("matplotlib", "plots", "a picture of a selection") from error
    batch, _, height, width = pixel_values.shape
    across = width // patch_size
    kept = torch.zeros(batch, 1 + (height // patch_size) * across, dtype=torch.bool)
    kept.scatter_(
        1, selection.places[:, 0, 0].expand(batch, -1).cpu(), selection.slot_mask[:, 0, 0].expand(batch, -1).cpu()
    )
    grid = kept[:, 1:].view(batch, height // patch_size, across)
    lit = grid.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    images = pixel_values.detach().float().cpu()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = ((images - low) / (high - low).clamp(min=1e-6)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    rows = -(-batch // columns)
    figure = Figure(figsize=(1.55 * columns, 1.8 * rows + (0.35 if caption else 0)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if index >= batch:
            continue
        # dropped patches fade towards a light grey, so that they differ from kept ones in colour and in contrast
        axis.imshow(torch.where(lit[index, :, :, None], images[index], 0.72 + 0.16 * images[index]).numpy())
        for y, x in grid[index].nonzero().tolist():
            corner = (x * patch_size - 0.5, y * patch_size - 0.5)
            axis.add_patch(Rectangle(corner, patch_size, patch_size, fill=False, linewidth=0.9, edgecolor="#e69f00"))
        if index < len(titles):
            axis.set_title(titles[index], fontsize=8)
    if caption:
        figure.supxlabel(caption, fontsize=9)
    return figure
