"""How often each position is kept, site by site."""

from __future__ import annotations

from typing import Any

import torch

from ..recording import Recording
from .style import MAP, new_figure


def heat_map(recording: Recording, tower: str | None = None, grid: tuple[int, int] | None = None) -> Any:
    """Draw the share of rows (and heads, queries) that kept each position, with one line or one map per site.

    A position that is bright at every site is kept for every input, which is position bias.

    Args:
        recording: of forward passes over as many rows as possible. tower: whose input is shown; that of the first site by default.
        grid: number of patches down and across the images; each site is then a map of the image, without the class token.

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
    if grid is not None:
        return _maps(sites, rates[:, rates.shape[-1] - grid[0] * grid[1] :], grid)
    figure = new_figure(max(4.5, min(11.0, 0.12 * longest + 2.2)), 1.5 + 0.36 * len(sites))
    axis = figure.subplots()
    image = axis.imshow(rates.numpy(), aspect="auto", cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
    axis.set_yticks(range(len(sites)), sites, fontsize=8)
    axis.set_xlabel(f"position in the input of '{tower}'", fontsize=9)
    _bar(figure, image, axis)
    return figure


def _maps(sites: list[str], rates: torch.Tensor, grid: tuple[int, int]) -> Any:
    """Draw one map of the image per site, four in a row."""
    columns = min(4, len(sites))
    figure = new_figure(1.0 + 2.1 * columns, 2.3 * -(-len(sites) // columns))
    axes = figure.subplots(-(-len(sites) // columns), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, site, rate in zip(axes.flat, sites, rates, strict=False):
        image = axis.imshow(rate.view(grid).numpy(), cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(site, fontsize=8)
    _bar(figure, image, axes)
    return figure


def _bar(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], fraction=0.05, pad=0.02)
    bar.set_label("kept in", fontsize=8)
    bar.ax.set_yticklabels(["no input", "half", "every input"], fontsize=8)
