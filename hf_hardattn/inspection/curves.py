"""Curves: faithfulness while positions are removed or added, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .style import MARKERS, SERIES, new_figure, plain


def faithfulness_curves(measured: Mapping[str, Mapping[str, Any]]) -> Any:
    """Draw deletion and insertion curves of several explanations side by side.

    Args:
        measured: maps the name of an explanation to the result of ``faithfulness``.

    Returns:
        matplotlib figure; the explanations differ in both colour and marker.
    """
    figure = new_figure(8.4, 3.8)
    areas: dict[str, list[str]] = {name: [] for name in measured}
    for axis, kind, better in zip(
        figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), ("lower", "higher"), strict=True
    ):
        for index, (name, result) in enumerate(measured.items()):
            curve = result["curves"][kind]
            share = [step / (len(curve) - 1) for step in range(len(curve))]
            style = {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
            axis.plot(share, curve, markersize=4, linewidth=1.6, **style)
            areas[name].append(f"{result[kind]:.2f}")
        plain(axis)
        axis.set_title(f"{kind}: {better} is better", fontsize=10)
        axis.set_xlabel(f"share of positions {'removed' if kind == 'deletion' else 'given'}, best first", fontsize=9)
    # Below the axes, where the legend covers no curve, with the areas under both curves in brackets.
    labels = [f"{name} ({', '.join(values)})" for name, values in areas.items()]
    figure.legend(figure.axes[0].lines, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.axes[0].set_ylabel("p(answer), relative to the unperturbed input", fontsize=9)
    return figure


def tradeoff(
    points: Mapping[str, Sequence[tuple[float, float]]],
    cost: str,
    quality: str,
    spread: Mapping[str, Sequence[float]] = {},
) -> Any:
    """Draw quality against cost, with one line per family of models (soft, hard at several budgets, random).

    Args:
        points: maps a family to its (cost, quality) pairs. cost, quality: labels of the axes with their units; a cost is counted or
            measured, never both in one figure. spread: maps a family to one error bar per point.

    Returns:
        matplotlib figure; further up and to the left is better.
    """
    figure = new_figure(5.2, 3.6)
    axis = figure.subplots()
    for index, (name, pairs) in enumerate(points.items()):
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])
        bars = [spread[name][i] for i in order] if name in spread else None
        axis.errorbar(
            [pairs[i][0] for i in order],
            [pairs[i][1] for i in order],
            yerr=bars,
            color=SERIES[index % len(SERIES)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=3,
            linewidth=1.6,
            label=name,
        )
    plain(axis)
    axis.set_xlabel(cost, fontsize=9)
    axis.set_ylabel(quality, fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure
