"""A video as a strip of frames, the kept ones framed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..recording import Recording
from .overlay import faded, shown
from .rationale import kept_places
from .style import KEPT, new_figure


def frame_strip(
    frames: Tensor,
    recording: Recording,
    timestamps: Sequence[float] = (),
    site: str | None = None,
    row: int = 0,
    columns: int = 8,
) -> Any:
    """Draw the frames of a video in order; the kept ones stay whole in a thick frame, the others fade.

    Args:
        frames: ``[F, C, height, width]``; frame f is place f of the site's input (a T5 encoder given one embedding a frame).
        recording: of one forward. timestamps: seconds, one a frame. site: the recording's first by default.

    Returns:
        matplotlib figure.
    """
    kept = kept_places(recording, site or recording.sites[0])
    chosen = kept[min(row, len(kept) - 1), : len(frames)].tolist()
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    figure = new_figure(1.35 * columns, 1.5 * rows)
    for index, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.set_xticks([])
        axis.set_yticks([])
        if index >= len(frames):
            axis.set_axis_off()
            continue
        frame = shown(frames[index])
        axis.imshow((frame if chosen[index] else faded(frame)).numpy())
        axis.spines[:].set(color=KEPT if chosen[index] else "#c8c8c8", linewidth=4 if chosen[index] else 0.8)
        when = f"{timestamps[index]:.2f} s" if index < len(timestamps) else f"{index}"
        axis.set_title(f"{when} (kept)" if chosen[index] else when, fontsize=8)
    return figure
