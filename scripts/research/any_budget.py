"""Accuracy of one model at every budget, beside models trained for one budget, random selection and the attention of CLS.

    hf-hardattn compare --config scripts/configs/compare/any_budget.yaml --seeds 1 --save
    python scripts/research/any_budget.py

``random`` and ``cls_attention`` choose for the model that was trained at drawn budgets, at the same budgets.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import hf_hardattn
from hf_hardattn.training.comparison import Comparison
from hf_hardattn.training.results import describe_run, write_json

BUDGETS = (0.1, 0.2, 0.4, 0.7, 1.0)
CONTROLS = ("random", "cls_attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("scripts/configs/compare/any_budget.yaml"))
    parser.add_argument("--models", type=Path, default=Path("outputs/compare/any_budget/models"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/any_budget.json"))
    args = parser.parse_args()
    task, _, variants = Comparison.read(args.config).settle()
    curves: dict[str, dict[str, float]] = {}
    for name in variants:
        place = args.models / f"{name}-{args.seed}"
        if place.is_dir():
            curves[name] = curve(task, place, None)
    general = args.models / f"any budget-{args.seed}"
    curves |= {scorer: curve(task, general, scorer) for scorer in CONTROLS}
    found = {
        "task": task.__class__.__name__,
        "metric": task.metric,
        "seed": args.seed,
        "budgets": BUDGETS,
        "curves": curves,
    }
    write_json(args.output, {**found, "versions": describe_run(None)["versions"]})
    for name, row in curves.items():
        print(f"{name:<18}", *(f"{float(budget):>4.0%} {100 * value:5.1f}" for budget, value in row.items()))


def curve(task: Any, place: Path, scorer: str | None) -> dict[str, float]:
    """The metric at each budget of the model at ``place``, or of the same weights with another scorer."""
    model = task.model_class.from_pretrained(place)
    torch.manual_seed(0)
    if scorer is not None:
        hf_hardattn.apply(model, {"sites": [task.site], "scorer": scorer, "estimator": "straight_through"})
    found = {}
    for budget in BUDGETS:
        hf_hardattn.set_budget(model, budget)
        found[str(budget)] = task.evaluate(model)[task.metric]
    return found


if __name__ == "__main__":
    main()
