"""One model at every budget, beside models trained for one budget."""

from __future__ import annotations

import statistics
from typing import Any

from . import read

NAMES = {
    "any budget": "one model, any budget",
    "trained for it": "a model trained for each budget",
    "cls_attention": "`cls_attention`, untrained",
    "random": "`random`",
    "downsampled": "full attention, smaller image",
}


def table() -> str:
    """Accuracy and measured time, one row a method and one column a budget; ToMe, which has no budget, below."""
    results = read("any_budget.json")
    if results is None or "timing" not in results:
        return "Not measured yet: `python scripts/research/any_budget.py`."
    found = {(row["method"], row["at"]): row for row in results["points"]}
    budgets = sorted({at for method, at in found if method == "any budget"})
    full = found["full attention", 1.0]
    lines = [
        f"| {' | '.join(['kept', *(f'{budget:.0%}' for budget in budgets)])} |",
        "|---" * (1 + len(budgets)) + "|",
    ]
    for method, title in NAMES.items():
        cells = [_cell(found[method, budget]) if (method, budget) in found else "" for budget in budgets]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    merged = [f"{_cell(row)} with {row['at']} pairs per layer" for row in results["points"] if row["method"] == "ToMe"]
    timing, seeds = results["timing"], results["seeds"]
    lines += [
        "",
        f"Accuracy in per cent (mean ± standard deviation over {seeds} seeds) and, in brackets, the measured time of a batch of {timing['batch']} relative to full "
        f"attention, which reaches {_accuracy(full)} (one thread of {timing['processor']}, medians of {timing['rounds']} interleaved rounds). ToMe, applied to the "
        f"model with full attention, reaches {'; '.join(merged)}. The task is cluttered digits with the site `{results['site']}`; `random` and `cls_attention` "
        "select for the model of the first row (`scripts/research/any_budget.py`).",
    ]
    return "\n".join(lines)


def _accuracy(row: dict[str, Any]) -> str:
    values = [100 * value for value in row["values"]]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _cell(row: dict[str, Any]) -> str:
    return f"{_accuracy(row)} ({row['time']:.2f})"
