"""Accuracy and measured time of one model at every budget, compared with models trained for one budget and other ways to compute less.

    hf-hardattn compare --config scripts/configs/compare/any_budget.yaml --seeds 3 --save
    python scripts/research/any_budget.py accuracy
    python scripts/research/any_budget.py timing      # on a quiet machine

The model was trained at drawn budgets; ``random`` and ``cls_attention`` replace its scorer at the same budgets. Smaller images are read by
models that were trained on them, and ToMe merges tokens in the soft model. ``timing`` times all of them in turn and draws the picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

import hf_hardattn
from hf_hardattn.devices import device_name
from hf_hardattn.efficiency.competing.tome import ToMe
from hf_hardattn.efficiency.timing import interleaved_seconds
from hf_hardattn.training.comparison import Comparison
from hf_hardattn.training.results import describe_run, write_json
from hf_hardattn.training.tasks._reduced import Reduced

BUDGETS = (0.1, 0.2, 0.4, 0.7, 1.0)
UNTRAINED = ("random", "cls_attention")
MERGED = (4, 8, 16, 24)  # pairs that ToMe merges per layer
BATCH = 64


class Point(NamedTuple):
    """One model at one budget. at: the budget, or the number of pairs that ToMe merges. task: the task that it is tested on."""

    method: str
    at: float
    task: Any
    model: nn.Module


def points(task: Any, folder: Path, seed: int) -> Iterator[Point]:
    """Yield every method at every budget."""

    def load(name: str) -> Any:
        return task.model_class.from_pretrained(folder / f"{name}-{seed}").eval()

    soft = load("soft")
    yield Point("full attention", 1.0, task, soft)
    for budget in BUDGETS:
        yield Point("any budget", budget, task, hf_hardattn.set_budget(load("any budget"), budget))
        for scorer in UNTRAINED:
            model = load("any budget")
            hf_hardattn.apply(model, {"sites": [task.site], "scorer": scorer, "estimator": "straight_through"})
            yield Point(scorer, budget, task, hf_hardattn.set_budget(model, budget).eval())
        if budget < 1:
            yield Point("trained for it", budget, task, load(f"trained at {budget:.0%}"))
            yield Point("downsampled", budget, Reduced(task, budget), load(f"downsampled to {budget:.0%}"))
    for merged in MERGED:
        yield Point("ToMe", merged, task, ToMe(soft, merged).eval())


def accuracy(task: Any, arguments: Any, results: dict[str, Any]) -> None:
    """Test every point with every seed."""
    found: dict[tuple[str, float], list[float]] = {}
    for seed in range(arguments.seeds):
        for point in points(task, arguments.models, seed):
            torch.manual_seed(0)
            value = point.task.evaluate(point.model)[task.metric]
            found.setdefault((point.method, point.at), []).append(value)
            print(f"seed {seed}  {point.method:<16} {point.at:>5}  {100 * value:.1f}", flush=True)
    results["points"] = [{"method": method, "at": at, "values": values} for (method, at), values in found.items()]


def timing(task: Any, arguments: Any, results: dict[str, Any]) -> None:
    """Time every point of the first seed against full attention."""
    calls = {}
    for point in points(task, arguments.models, 0):
        inputs = {key: x for key, x in next(point.task.test()).inputs.items() if key != "labels"}
        inputs["pixel_values"] = inputs["pixel_values"][:BATCH]
        calls[point.method, point.at] = partial(forward, point.model, inputs)
    seconds = interleaved_seconds(calls, rounds=arguments.rounds)
    stock = statistics.median(seconds["full attention", 1.0])
    results["timing"] = {"batch": BATCH, "rounds": arguments.rounds, "threads": 1, "processor": device_name()}
    for row in results["points"]:
        row["time"] = statistics.median(seconds[row["method"], row["at"]]) / stock
    draw(results, arguments.output.with_suffix(".png"))


def forward(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Run the timed call."""
    with torch.inference_mode():
        model(**inputs)


def draw(results: dict[str, Any], place: Path) -> None:
    """Plot accuracy over time, with one line per method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in results["points"]):
        rows = sorted(
            (row["time"], 100 * statistics.mean(row["values"])) for row in results["points"] if row["method"] == method
        )
        alone = len(rows) == 1
        axes.plot(*zip(*rows, strict=True), marker="*" if alone else "o", markersize=11 if alone else 5, label=method)
    axes.set_xlabel("time of a batch, full attention = 1 (measured)")
    axes.set_ylabel(f"{results['metric']} (points)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(place, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("accuracy", "timing"))
    parser.add_argument("--config", type=Path, default=Path("scripts/configs/compare/any_budget.yaml"))
    parser.add_argument("--models", type=Path, default=Path("outputs/compare/any_budget/models"))
    parser.add_argument("--seeds", type=int, default=3, help="number of trained seeds (default: 3)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--output", type=Path, default=Path("results/any_budget.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, _, _ = Comparison.read(arguments.config).settle()
    results: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    results |= {"task": task.__class__.__name__, "metric": task.metric, "site": task.site, "seeds": arguments.seeds}
    {"accuracy": accuracy, "timing": timing}[arguments.part](task, arguments, results)
    write_json(arguments.output, {**results, "versions": describe_run(None)["versions"]})


if __name__ == "__main__":
    main()
