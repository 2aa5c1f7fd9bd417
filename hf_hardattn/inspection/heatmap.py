"""How often each place is kept, site by site."""

from __future__ import annotations

from typing import Any

import torch

from ..recording import Recording
from .style import MAP, new_figure


def heat_map(recording: Recording, tower: str | None = None) -> Any:
    """Draw the share of rows (and heads, queries) that kept each place, one line a site.

    A column that is bright in every line is a place kept whatever the input: position bias. A place is a token or patch of the
    tower's input; place 0 of an image is CLS.

    Args:
        recording: of forwards over as many rows as you have. tower: whose input the places belong to; the first by default.

    Returns:
        matplotlib figure.
    """
    tower = tower or recording.tower(recording.sites[0])
    sites = [site for site in recording.sites if recording.tower(site) == tower]
    lines = []
    for site in sites:
        kept = [recording.kept(selection).flatten(0, 2).float() for selection in recording[site]]
        longest = max(k.shape[-1] for k in kept)
        lines.append(torch.cat([torch.nn.functional.pad(k, (0, longest - k.shape[-1])) for k in kept]).mean(0))
    longest = max(len(line) for line in lines)
    rates = torch.stack([torch.nn.functional.pad(line, (0, longest - len(line))) for line in lines]).cpu()
    figure = new_figure(max(4.5, min(11.0, 0.12 * longest + 2.2)), 1.5 + 0.36 * len(sites))
    axis = figure.subplots()
    image = axis.imshow(rates.numpy(), aspect="auto", cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(len(sites)), sites, fontsize=8)
    axis.set_xlabel(f"place in the input of '{tower}'", fontsize=9)
    bar = figure.colorbar(image, ax=axis, ticks=[0, 0.5, 1], fraction=0.05, pad=0.02)
    bar.set_label("kept in", fontsize=8)
    bar.ax.set_yticklabels(["no row", "half", "every row"], fontsize=8)
    return figure
