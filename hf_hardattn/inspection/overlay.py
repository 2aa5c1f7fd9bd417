"""Images with the kept patches lit and the dropped ones faded: a batch at one site, or one image layer by layer."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import HardAttentionError
from ..modeling.selection import Selection
from ..recording import Recording
from .agreement import Difference
from .style import GREEN, KEPT, OTHER, new_figure


def patch_overlay(
    pixel_values: Tensor,
    selection: Selection,
    patch_size: int,
    titles: Sequence[str] = (),
    columns: int = 6,
    caption: str = "",
) -> Any:
    """Draw images in which the patches that a ``vision`` site kept are lit and framed, and the others are faded.

    Args:
        pixel_values: ``[B, C, height, width]``, C = 1 or 3, any range (each image is scaled by its own range).
        selection: of ``vision.inputs`` or ``vision.tokens.L`` for the same batch; rows that are not patches (CLS, registers) come first.
        patch_size: side of a patch, in pixels.
        titles: one per image. columns: images per row. caption: text below the figure.

    Returns:
        matplotlib figure; ``figure.savefig("kept.png")``.
    """
    batch, _, height, width = pixel_values.shape
    patches = (height // patch_size) * (width // patch_size)
    protected = selection.protected
    # A later site has fewer rows than the image; ``protected`` then shows how many rows come before the patches.
    first = max(0, selection.valid.shape[-1] - patches) if protected is None else int(protected.flatten(0, -2)[0].sum())
    kept = torch.zeros(batch, first + patches, dtype=torch.int)
    places = selection.places[:, 0, 0].expand(batch, -1).cpu()
    kept.scatter_reduce_(1, places, selection.slot_mask[:, 0, 0].expand(batch, -1).int().cpu(), "amax")
    return _grid(pixel_values, kept.bool(), patch_size, titles, columns, caption)


def layer_overlay(
    pixel_values: Tensor, recording: Recording, patch_size: int, row: int = 0, columns: int = 4, whole: bool = True
) -> Any:
    """Draw one image as each ``vision`` site left it, in order, beside the image itself.

    Args:
        pixel_values: ``[B, C, height, width]``. recording: of one forward pass of this batch. row: which image.
        columns: pictures per row. whole: also draw the image itself.

    Returns:
        matplotlib figure; each title names the site and the share of all patches that it kept.
    """
    sites = [site for site in recording.sites if site.startswith("vision.")]
    if not sites:
        raise HardAttentionError(
            f"the recording has no vision site to draw; it has: {', '.join(recording.sites)}. Draw text with token_highlight."
        )
    found = [recording.kept(recording[site][0]).flatten(1, 2).any(1) for site in sites]
    kept = torch.stack([torch.ones_like(found[0][0]), *(mask[min(row, len(mask) - 1)] for mask in found)]).cpu()
    height, width = pixel_values.shape[-2:]
    patches = kept[1:, kept.shape[1] - (height // patch_size) * (width // patch_size) :]
    titles = ["image", *(f"{site}: {mask.float().mean():.0%}" for site, mask in zip(sites, patches, strict=True))]
    frames = [False] + [True] * len(sites)
    if not whole:
        kept, titles, frames = kept[1:], titles[1:], frames[1:]
    image = pixel_values[row : row + 1].expand(len(kept), -1, -1, -1)
    return _grid(image, kept, patch_size, titles, min(columns, len(kept)), "", frames=frames)


def whole_image(pixel_values: Tensor) -> Any:
    """Draw the first image of a batch unchanged, at the size of an overlay.

    Args:
        pixel_values: ``[B, C, height, width]``.
    """
    figure = new_figure(1.55, 1.8)
    axis = figure.subplots()
    axis.set_axis_off()
    axis.imshow(shown(pixel_values[0]).numpy())
    axis.set_title("image", fontsize=8)  # overlays have a title, too, and this is shown beside one
    return figure


def difference_overlay(pixel_values: Tensor, difference: Difference, patch_size: int, rows: int = 6) -> Any:
    """Draw which patches of the same images two models kept differently, the most changed images first.

    Thin frames: both models keep the patch. Thick blue frames: only the first. Thick green, dotted frames: only the second.

    Args:
        pixel_values: ``[B, C, height, width]``. difference: of ``agreement.selection_diff`` at a ``vision`` site.

    Returns:
        matplotlib figure.
    """
    chosen = difference.order[:rows]
    any_ = difference.both | difference.first_only | difference.second_only
    titles = [f"-{int(difference.first_only[r].sum())} +{int(difference.second_only[r].sum())}" for r in chosen]
    figure = _grid(
        pixel_values[chosen], any_[chosen], patch_size, titles, min(6, len(chosen)), str(difference), [False] * rows
    )
    for axis, row in zip(figure.axes, chosen, strict=False):
        size = pixel_values.shape[-2:]
        frame_patches(axis, difference.both[row], patch_size, size)
        frame_patches(axis, difference.first_only[row], patch_size, size, edgecolor=OTHER, linewidth=2.4)
        frame_patches(
            axis, difference.second_only[row], patch_size, size, edgecolor=GREEN, linewidth=2.4, linestyle=":"
        )
    return figure


def shown(image: Tensor) -> Tensor:
    """Convert an image ``[C, height, width]`` of any range to ``[height, width, 3]`` in [0, 1]."""
    image = image.detach().float().cpu()
    return ((image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)).expand(3, -1, -1).permute(1, 2, 0)


def faded(image: Tensor) -> Tensor:
    """Fade an image towards light grey, so that dropped patches differ from kept ones in both colour and contrast."""
    return 0.72 + 0.16 * image


def lit_image(image: Tensor, kept: Tensor, patch_size: int) -> Tensor:
    """Return an image as ``shown`` does, but faded where ``kept``, bool ``[CLS and registers + patches]``, is False."""
    _, height, width = image.shape
    down, across = height // patch_size, width // patch_size
    lit = (
        kept[len(kept) - down * across :]
        .view(down, across)
        .repeat_interleave(patch_size, 0)
        .repeat_interleave(patch_size, 1)
    )
    lit = torch.nn.functional.pad(lit, (0, width - across * patch_size, 0, height - down * patch_size))
    image = shown(image)
    return torch.where(lit[..., None], image, faded(image))


def frame_patches(axis: Any, kept: Tensor, patch_size: int, size: Sequence[int], **style: Any) -> None:
    """Draw a frame around each kept patch of an image of ``size`` (height, width); ``style``: options of matplotlib's rectangles."""
    from matplotlib.patches import Rectangle

    down, across = size[0] // patch_size, size[1] // patch_size
    style = {"linewidth": 0.9, "edgecolor": KEPT, **style}
    first = len(kept) - down * across  # CLS and registers, if there are any
    for place in kept[first:].nonzero().flatten().tolist():
        corner = (place % across * patch_size - 0.5, place // across * patch_size - 0.5)
        axis.add_patch(Rectangle(corner, patch_size, patch_size, fill=False, **style))


def _grid(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    titles: Sequence[str],
    columns: int,
    caption: str,
    frames: Sequence[bool] = (),
) -> Any:
    batch = len(images)
    rows = -(-batch // columns)
    caption = textwrap.fill(caption, 24 * columns)
    figure = new_figure(1.55 * columns, 1.8 * rows + (0.2 + 0.15 * (caption.count("\n") + 1) if caption else 0))
    axes = figure.subplots(rows, columns, squeeze=False)
    for index, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if index >= batch:
            continue
        axis.imshow(lit_image(images[index], kept[index], patch_size).numpy())
        if not frames or frames[index]:
            frame_patches(axis, kept[index], patch_size, images.shape[-2:])
        if index < len(titles):
            axis.set_title(titles[index], fontsize=8)
    if caption:
        figure.supxlabel(caption, fontsize=9)
    return figure
