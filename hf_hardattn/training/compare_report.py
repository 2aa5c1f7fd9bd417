"""Report of a comparison: a summary of its rows, a table, and a plot of the metric against counted FLOPs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..budget import final_budget
from ..devices import default_device, device_name
from ..errors import missing_extra
from .comparison import CONTROLS, Comparison
from .results import describe_run, read_json

COLLAPSED = 2.0  # points: a learned selection that is not better than a random one by this margin has learned nothing


def report(
    comparison: Comparison, rows: list[dict[str, Any]], command: str, *, quick: bool, jobs: int, threads: int
) -> dict[str, Any]:
    """Return the record of a comparison, as JSON: its definition, every run, the summary, and how it was produced."""
    task, recipe, variants = comparison.settle(quick)
    run = describe_run(None)
    return {
        "command": command,
        "task": comparison.task,
        "task_options": comparison.task_options,
        "recipe": asdict(recipe),
        "trunk_seed": comparison.trunk_seed,
        "variants": variants,
        "metric": task.metric,
        "points": task.points,
        "seeds": sorted({row["seed"] for row in rows}),
        "summary": summarise(rows, task.metric, task.points),
        "runs": rows,
        "measured": {"device": default_device().type, "processor": device_name(), "threads": threads, "jobs": jobs},
        "versions": run["versions"],
        "platform": run["platform"],
    }


def is_part_of(path: Path, comparison: Comparison, quick: bool, seeds: list[int]) -> bool:
    """Whether a report belongs to the same comparison and has no other variants or seeds, so that replacing it loses nothing."""
    try:
        found = read_json(path)
        task, recipe, variants = comparison.settle(quick)
        same = found["task"] == comparison.task and found["recipe"] == json.loads(json.dumps(asdict(recipe)))
        return same and set(found["variants"]) <= set(variants) and set(found["seeds"]) <= set(seeds)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def summarise(rows: list[dict[str, Any]], metric: str, points: float) -> dict[str, dict[str, Any]]:
    """Reduce the rows of ``compare.compare`` to one entry per variant, in the same order.

    Args:
        metric: the main metric. points: factor that converts it to points out of 100.

    Returns:
        For each variant: ``runs``; ``failed``, the number that raised or collapsed, with ``messages``; ``metrics``, each with ``mean`` and
        ``sd`` over the finished runs, including collapsed ones (``sd`` is None for fewer than two); ``gflops``; ``seconds`` of training;
        and ``to_soft`` and ``to_random`` (random selection at the same sites and budget), in points of the main metric over the same seeds.
    """
    random = {(_place(row), row["seed"]): row for row in rows if _is_random(row) and row["status"] == "finished"}
    soft = {(None, row["seed"]): row for row in rows if not _fields(row) and row["status"] == "finished"}
    summary = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        ended = [row for row in mine if row["status"] == "finished"]
        over_random = _differences(ended, random, metric, points, _place)
        judged = bool(_fields(mine[0])) and name not in CONTROLS and not _is_random(mine[0])
        collapsed = [seed for seed, value in over_random.items() if judged and value < COLLAPSED]
        messages = [f"seed {row['seed']}: {row['message']}" for row in mine if row["status"] == "failed"]
        messages += [f"seed {seed}: collapsed, {over_random[seed]:+.1f} points to random" for seed in collapsed]
        names = dict.fromkeys(key for row in ended for key in row["metrics"])
        summary[name] = {
            "runs": len(mine),
            "failed": len(messages),
            "messages": messages,
            "metrics": {key: _spread([row["metrics"][key] for row in ended]) for key in names},
            "to_soft": _spread(_differences(ended, soft, metric, points, lambda row: None).values()),
            "to_random": _spread(over_random.values()),
            "gflops": _spread([row["gflops"] for row in ended])["mean"],
            "seconds": _spread([row["seconds"]["train"] for row in ended])["mean"],
        }
    return summary


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    return row["spec"]["hard_attention"] or {}


def _is_random(row: dict[str, Any]) -> bool:
    return _fields(row).get("scorer") == "random"


def _place(row: dict[str, Any]) -> str:
    """Key of sites and final budget, which a selection shares with its random control."""
    fields = _fields(row)
    return json.dumps([fields.get("sites"), final_budget(fields.get("budget"))], sort_keys=True)


def _differences(
    rows: list[dict[str, Any]], others: dict[Any, dict[str, Any]], metric: str, points: float, key: Any
) -> dict[int, float]:
    """Difference in points, by seed, between each run and the other run of its seed."""
    pairs = {row["seed"]: (row, others.get((key(row), row["seed"]))) for row in rows}
    return {
        seed: (row["metrics"][metric] - other["metrics"][metric]) * points
        for seed, (row, other) in pairs.items()
        if other is not None
    }


def _spread(values: Iterable[float]) -> dict[str, float | None]:
    values = list(values)
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table of a results JSON: its header and its rows, as text."""
    metric, points = results["metric"], results["points"]
    extra = [name for row in results["summary"].values() for name in row["metrics"] if name not in (metric, "kept")]
    extra = list(dict.fromkeys(extra))
    header = [
        "variant",
        metric,
        "vs. full attention",
        "vs. random",
        *extra,
        "kept",
        "failed",
        "GFLOPs (counted)",
        "train s",
    ]
    rows = []
    for name, row in results["summary"].items():
        found = row["metrics"]
        # precision and recall are ratios; the other metrics of the task share the scale of the main one
        scales = {metric: points, **dict.fromkeys(extra, points), "precision": 100.0, "recall": 100.0}
        rows.append(
            [
                name,
                _show(found.get(metric), scales[metric]),
                _show(row["to_soft"], 1.0, sign=True) if name != "soft" else "",
                _show(row["to_random"], 1.0, sign=True) if name != "random" else "",
                *(_show(found.get(key), scales[key]) for key in extra),
                "100%" if "kept" not in found else f"{found['kept']['mean']:.0%}",
                f"{row['failed']} of {row['runs']}",
                "" if row["gflops"] is None else f"{row['gflops']:.4f}",
                "" if row["seconds"] is None else f"{row['seconds']:.0f}",
            ]
        )
    return header, rows


def _show(spread: dict[str, float | None] | None, scale: float, sign: bool = False) -> str:
    if spread is None or spread["mean"] is None:
        return ""
    text = f"{spread['mean'] * scale:{'+' if sign else ''}.1f}"
    return text if spread["sd"] is None else f"{text} ± {spread['sd'] * scale:.1f}"


def markdown(results: dict[str, Any]) -> str:
    """Return the table in Markdown, with a line about its origin and the messages of failed runs."""
    header, rows = cells(results)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    seeds, recipe, measured = results["seeds"], results["recipe"], results["measured"]
    devices = {row["device"] for row in results["runs"] if "device" in row} or {"cpu"}
    places = [f"{measured['threads']} CPU thread{'s' * (measured['threads'] > 1)}"] * ("cpu" in devices)
    places += ["a GPU"] * ("cuda" in devices)
    where = " or ".join(places) + ", as each run says" * (len(places) > 1)
    one = " (one for all seeds)" if results.get("trunk_seed") is not None else ""
    lines += [
        "",
        f"`{results['command']}`: {len(seeds)} seed{'s' * (len(seeds) > 1)}, mean ± standard deviation; {recipe['trunk_steps']:,} steps of the soft "
        f"base checkpoint{one}, then {recipe['branch_steps']:,} steps each, batch {recipe['batch']}; seconds on {where}. "
        f"Failed: raised, diverged, or within {COLLAPSED:.0f} points of the random choice.",
    ]
    lines += [f"- `{name}`, {message}" for name, row in results["summary"].items() for message in row["messages"]]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Save a plot of each variant's main metric with its runs, and of the metric against counted FLOPs."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plots", "the plot of a comparison") from error
    metric, points = results["metric"], results["points"]
    shown = [(name, row) for name, row in results["summary"].items() if row["gflops"] is not None]
    figure = Figure(figsize=(10, 1.6 + 0.24 * max(len(shown), 8)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (name, row) in enumerate(shown):
        mean, sd = (row["metrics"][metric][key] or 0.0 for key in ("mean", "sd"))
        colour = "0.45" if name in CONTROLS else "C3" if row["failed"] else "C0"
        mark = "s" if name in CONTROLS else "o"
        runs = [r["metrics"][metric] * points for r in results["runs"] if r["variant"] == name and "metrics" in r]
        left.plot(runs, [place] * len(runs), "|", color=colour, alpha=0.6, markersize=7)
        left.errorbar(mean * points, place, xerr=sd * points, fmt=mark, color=colour, markersize=5, capsize=2)
        right.errorbar(row["gflops"], mean * points, yerr=sd * points, fmt=mark, color=colour, markersize=5, capsize=2)
    names = [name + f"  ({row['failed']} of {row['runs']} failed)" * bool(row["failed"]) for name, row in shown]
    left.set_yticks(range(len(shown)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel(f"{metric} (points)")
    right.set_ylabel(f"{metric} (points)")
    right.set_xlabel("GFLOPs per example, forward (counted)")
    right.set_xlim(0, 1.08 * max((row["gflops"] for _, row in shown), default=1.0))
    labelled = [item for item in shown if item[0] in ("soft", "random")]
    learned = [item for item in shown if item[0] not in CONTROLS]
    if learned:
        labelled.append(max(learned, key=lambda item: _mean(item[1], metric)))
    for name, row in labelled:
        where = (row["gflops"], _mean(row, metric) * points)
        side = "right" if row["gflops"] > right.get_xlim()[1] / 2 else "left"
        right.annotate(
            name, where, xytext=(-6 if side == "right" else 6, -3), textcoords="offset points", fontsize=8, ha=side
        )
    for axis in (left, right):
        axis.grid(alpha=0.25)
    count = len(results["seeds"])
    note = "grey: controls; red: a run failed" if any(row["failed"] for _, row in shown) else "grey: controls"
    figure.suptitle(
        f"{results['task']}, {count} seed{'s' * (count > 1)}: mean ± sd, one tick per run; {note}", fontsize=10
    )
    figure.savefig(path, dpi=150)


def _mean(row: dict[str, Any], metric: str) -> float:
    return row["metrics"][metric]["mean"]
