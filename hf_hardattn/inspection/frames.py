"""A video as a strip of frames, in which the kept ones have a thick border."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..recording import Recording
from .overlay import faded, lit_image, shown
from .rationale import frame_places, kept_places
from .style import KEPT, new_figure


def frame_strip(
    frames: Tensor,
    recording: Recording,
    timestamps: Sequence[float] = (),
    site: str | None = None,
    row: int = 0,
    columns: int = 8,
) -> Any:
    """Draw the frames of a video in order: dropped patches are faded, and a frame of which something was kept has a thick border.

    Args:
        frames: ``[F, C, height, width]``; in the input of the site, a frame is a set of patches (BLIP's vision tower) or a single
            position (a T5 encoder with one embedding per frame).
        recording: of one forward pass. timestamps: seconds, one per frame. site: the first in the recording by default.

    Returns:
        matplotlib figure.
    """
    site = site or recording.sites[0]
    kept, patches = kept_places(recording, site), recording.tower(site) == "vision"
    chosen = frame_places(kept[min(row, len(kept) - 1)].cpu(), len(frames), patches)
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    figure = new_figure(1.35 * columns, 1.5 * rows)
    for index, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.set_xticks([])
        axis.set_yticks([])
        if index >= len(frames):
            axis.set_axis_off()
            continue
        held, share = bool(chosen[index].any()), float(chosen[index].float().mean())
        axis.imshow(_lit(frames[index], chosen[index]).numpy())
        axis.spines[:].set(color=KEPT if held else "#c8c8c8", linewidth=4 if held else 0.8)
        when = f"{timestamps[index]:.2f} s" if index < len(timestamps) else f"{index}"
        axis.set_title(f"{when} ({'kept' if share == 1.0 else f'{share:.0%}'})" if held else when, fontsize=8)
    return figure


def _lit(frame: Tensor, kept: Tensor) -> Tensor:
    """Return a frame, ``[height, width, 3]``, faded where ``kept`` ``[P]`` is False; P counts square patches, or is 1 for the frame."""
    if len(kept) == 1:
        return shown(frame) if bool(kept[0]) else faded(shown(frame))
    side = round((frame[0].numel() / len(kept)) ** 0.5)
    return lit_image(frame, torch.nn.functional.pad(kept, (1, 0)), side)
