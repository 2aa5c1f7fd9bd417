"""Which source tokens each target token read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..recording import Recording
from .rationale import kept_per_token
from .style import MAP, new_figure


def selection_matrix(
    recording: Recording,
    source: Sequence[str],
    target: Sequence[str],
    site: str | None = None,
    row: int = 0,
    beam_indices: Tensor | None = None,
) -> Any:
    """Draw source × target; a cell is filled if the decoder could read the source token when it produced the target token.

    Args:
        recording: of one ``generate()``, or of one forward pass with the whole target.
        source, target: tokens of ``row``, as they are shown. site: a ``cross`` site; the first in the recording by default.
        beam_indices: returned by ``generate``, see ``kept_per_token``.

    Returns:
        matplotlib figure. If a site makes one choice for all queries, all lines are equal.
    """
    site = site or next((s for s in recording.sites if ".cross." in s), recording.sites[-1])
    selections = recording[site]
    if len(selections) > 1 or beam_indices is not None:
        kept = kept_per_token(recording, site, beam_indices)[row]
    else:
        kept = recording.kept(selections[0])[min(row, selections[0].mask.shape[0] - 1)].any(0)
    kept = kept[: len(target), : len(source)].cpu()
    kept = kept.expand(len(target), -1) if len(kept) == 1 else kept
    figure = new_figure(1.6 + 0.26 * len(source), 1.5 + 0.24 * len(kept))
    axis = figure.subplots()
    axis.pcolormesh(kept.float().numpy(), cmap=MAP, vmin=0, vmax=1, edgecolors="#808080", linewidth=0.5)
    axis.invert_yaxis()
    axis.set_aspect("equal")
    # A dollar sign would start matplotlib's math mode.
    axis.set_xticks(
        [i + 0.5 for i in range(len(source))], [_plain(t) for t in source], rotation=60, ha="right", fontsize=8
    )
    axis.set_yticks([i + 0.5 for i in range(len(kept))], [_plain(t) for t in target[: len(kept)]], fontsize=8)
    axis.set_title(f"{site}: light = kept", fontsize=9)
    return figure


def _plain(token: str) -> str:
    return token.replace("$", r"\$")
