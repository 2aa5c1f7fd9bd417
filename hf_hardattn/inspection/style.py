"""How every picture looks: colours that colour-blind people tell apart, on a ground that carries both themes."""

from __future__ import annotations

from typing import Any

from ..errors import missing_extra

# Okabe & Ito's palette; kept and dropped also differ in lightness, so that a grey print still tells them apart.
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
MAP = "cividis"  # perceptually uniform, and the same to colour-blind eyes


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches; white, so that a dark page frames it and its ink stays readable.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plots", "a picture of a selection") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def plain(axis: Any) -> None:
    """Take the frame's top and right away and put a faint grid behind."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
