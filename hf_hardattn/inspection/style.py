"""The style of all pictures: colours that colour-blind people can distinguish, on a background that suits both themes."""

from __future__ import annotations

from typing import Any

from ..errors import missing_extra

# Okabe & Ito's palette; kept and dropped also differ in lightness, so that they can be distinguished in a grey print.
KEPT, OTHER, ACCENT, GREEN, PURPLE, INK, FAINT = (
    "#e69f00",
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#222222",
    "#b8b8b8",
)
SERIES = (OTHER, KEPT, GREEN, PURPLE, ACCENT, "#56b4e9", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAP = "cividis"  # perceptually uniform, and looks the same to colour-blind people


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, with its size in inches; white, so that it is readable on a dark page too.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that installs it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plots", "a picture of a selection") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def plain(axis: Any) -> None:
    """Remove the top and right lines of the frame, and draw a faint grid behind the data."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
