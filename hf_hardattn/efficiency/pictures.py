"""Pictures of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import missing_extra
from .bench import UNCOMPILED
from .report import is_control

SHOWN = {
    "stock": "original Transformers",
    "exact": "hf_hardattn at budget 1.0",
}  # names of the rows that are not selections
MARKERS = {"stock": "s", "exact": "D"}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise missing_extra("matplotlib", "plots", "the benchmark's picture") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the picture of the suite."""
    {"pareto": pareto, "growth": growth, "break_even": break_even}[results["picture"]](results, path)


def pareto(results: dict[str, Any], path: Path) -> None:
    """Measured speed-up against peak memory, both relative to the original model, with one colour per workload. The Pareto-optimal rows of
    each workload are joined. The lower right corner is best."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    shown = [group for group in results["groups"] if "stock" in group["rows"]]
    colours = plt.get_cmap("tab20").colors
    for group, colour in zip(shown, colours, strict=False):
        stock = group["rows"]["stock"]
        points = [
            (row["against_stock"]["median"], row["peak_bytes"] / stock["peak_bytes"], name)
            for name, row in group["rows"].items()
            if name != UNCOMPILED and not is_control(group, name)  # a control does not choose what it keeps
        ]
        front = sorted(p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] and q[:2] != p[:2] for q in points))
        axis.plot([p[0] for p in front], [p[1] for p in front], color=colour, linewidth=1)
        for x, y, name in points:
            axis.scatter(x, y, color=colour, marker=MARKERS.get(name, "o"), s=36, zorder=3)
        axis.plot([], [], color=colour, marker="o", label=f"{group['name']}: {max(points)[0]:.2f}×")
    for label, marker in (*((SHOWN[name], marker) for name, marker in MARKERS.items()), ("a selection", "o")):
        axis.plot([], [], color="0.4", marker=marker, linestyle="", label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    every = [point for group in shown for point in group["rows"].values()]
    speeds = [row["against_stock"]["median"] for row in every]
    ticks = [tick for tick in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8) if min(speeds) / 1.5 < tick < 1.5 * max(speeds)]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    low, high = axis.get_ylim()
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2) if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axis.minorticks_off()
    axis.axvline(1, color="0.7", linewidth=0.8)
    axis.axhline(1, color="0.7", linewidth=0.8)
    axis.set_xlabel("speed relative to original Transformers (measured)")
    axis.set_ylabel("peak memory relative to original Transformers")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(results: dict[str, Any], path: Path) -> None:
    """Seconds and peak memory against length, log-log; one column per model."""
    plt = _pyplot()
    from matplotlib.ticker import LogLocator

    models = list(dict.fromkeys(group["workload"]["model"] for group in results["groups"]))
    figure, axes = plt.subplots(2, len(models), figsize=(5 * len(models), 7), layout="constrained", squeeze=False)
    for column, model in enumerate(models):
        groups = [group for group in results["groups"] if group["workload"]["model"] == model]
        names = list(dict.fromkeys(name for group in groups for name in group["rows"]))
        for name in names:
            held = [group for group in groups if name in group["rows"]]
            sizes = [group["workload"]["size"] for group in held]
            rows = [group["rows"][name] for group in held]
            (line,) = axes[0][column].plot(
                sizes, [row["seconds"]["median"] for row in rows], marker="o", label=SHOWN.get(name, name)
            )
            axes[1][column].plot(sizes, [row["peak_bytes"] / 2**20 for row in rows], marker="o")
            if name not in ("stock", "exact"):
                layers = [row["later_layers_seconds"] for row in rows]
                axes[0][column].plot(
                    sizes,
                    layers,
                    "--",
                    marker=".",
                    color=line.get_color(),
                    label="of that, the layers after the selection",
                )
        unit = "tokens" if model.startswith("t5") else "pixels per side"
        for axis, what in ((axes[0][column], "seconds"), (axes[1][column], "peak memory, MiB")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            every = sorted({group["workload"]["size"] for group in groups})
            axis.set_xticks(every, [f"{size:,}" for size in every], fontsize=8)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_xlabel(unit)
            axis.set_ylabel(what)
        layers = groups[0]["workload"]["layers"]
        axes[0][column].set_title(f"{groups[0]['name'].rsplit(' ', 2)[0]}, {layers} layers")
        axes[0][column].set_ylim(top=30 * axes[0][column].get_ylim()[1])  # room for the legend above the lines
        axes[0][column].legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def break_even(results: dict[str, Any], path: Path) -> None:
    """Speed-up against length, one line per row; below the line at 1, selection is slower."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    names = list(dict.fromkeys(name for group in results["groups"] for name in group["hard"]))
    kinds = list(dict.fromkeys(name.split(" keep")[0] + name.split(",")[-1] * ("," in name) for name in names))
    styles = dict(zip(kinds, ("-", ":", "--", "-."), strict=False))
    budgets = sorted({hard["budget"] for group in results["groups"] for hard in group["hard"].values()})
    colours = dict(zip(budgets, plt.get_cmap("viridis")([i / len(budgets) for i in range(len(budgets))]), strict=True))
    for name in names:
        kind = name.split(" keep")[0] + name.split(",")[-1] * ("," in name)
        held = [group for group in results["groups"] if name in group["rows"]]
        axis.plot(
            [group["workload"]["size"] for group in held],
            [group["rows"][name]["against_stock"]["median"] for group in held],
            styles[kind],
            marker=".",
            color=colours[held[0]["hard"][name]["budget"]],
            label=name,
        )
    axis.axhline(1, color="0.3", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    sizes = sorted({group["workload"]["size"] for group in results["groups"]})
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5×", "1×", "2×", "4×", "8×"])
    axis.set_xlabel("tokens")
    axis.set_ylabel("speed relative to original Transformers (below 1: slower)")
    axis.legend(fontsize=7, handlelength=3.5, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def accuracy_and_speed(results: dict[str, Any], path: Path) -> None:
    """Accuracy against measured speed, one line per method; the upper right corner is best."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    families: dict[str, list[tuple[float, float]]] = {}
    for name, row in results["methods"].items():
        family = name.split(" keep ")[0].split(" r=")[0]
        families.setdefault(family, []).append((row["against_soft"]["median"], 100 * row["accuracy"]))
    for family, points in families.items():
        ours = family.startswith("ours, ")
        axis.plot(
            *zip(*sorted(points), strict=True),
            marker="*" if ours else "o",
            markersize=16 if ours else 5,
            label=family,
            zorder=3 if ours else 2,
        )
    axis.set_xlabel("images per second relative to the soft model (measured)")
    axis.set_ylabel("accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
