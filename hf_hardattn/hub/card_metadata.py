"""Metadata of the card, which the Hub's search and widgets read."""

from __future__ import annotations

import statistics
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .record import missing

LIBRARY = "hf-hardattn"


def metadata(record: dict[str, Any]) -> ModelCardData:
    """Build the YAML block: library, base model and relation, model-index, emissions, tags."""
    task, base, energy = record["task"], record["base"], record["energy"]
    extra: dict[str, Any] = {}
    if base["model"] != "none":
        extra = {"base_model": base["model"], "base_model_relation": base["relation"]}
    if missing(energy) is None:
        extra["co2_eq_emissions"] = {
            "emissions": energy["co2_grams"],
            "source": f"{energy['software']}, {energy['how']}, {energy['scope']}",
            "training_type": "pre-training" if base["model"] == "none" else "fine-tuning",
            "geographical_location": energy["region"],
            "hardware_used": energy["hardware"],
        }
    values = run_values(record, "hard")
    count = f"{len(values)} seed{'s' * (len(values) != 1)}"
    result = EvalResult(
        task_type=task["type"],
        dataset_type=task["dataset_type"],
        dataset_name=task["dataset_name"],
        dataset_split=task["split"],
        dataset_revision=task["revision"],
        metric_type=task["metric_type"],
        metric_name=f"{task['metric_name']} (hard, {'mean ± sd, ' if len(values) > 1 else ''}{count})",
        metric_value=shown_values(values, task["unit"]),
    )
    return ModelCardData(
        language=record["language"] or None,
        license=record["license"],
        library_name=LIBRARY,
        pipeline_tag=record["pipeline_tag"],
        tags=[LIBRARY, "hard-attention", *record["tags"]],
        metrics=[task["metric_type"]],
        model_name=record["name"],
        eval_results=[result],
        **extra,
    )


def run_values(record: dict[str, Any], variant: str) -> list[float]:
    """Return the values of a variant's runs, without runs that have none."""
    return [run["value"] for run in record["runs"] if run["variant"] == variant and missing(run["value"]) is None]


def shown(value: float, unit: str) -> str:
    """Format a value of the task's metric for the card."""
    return f"{value:.1%}" if unit == "share" else f"{value:.2f}" if unit == "points" else f"{value:.4g}"


def shown_values(values: list[float], unit: str) -> str | float:
    """Format one value unchanged, several as mean ± standard deviation."""
    if len(values) < 2:
        return round(values[0], 6) if values else "no completed run"
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    if unit == "share":
        return f"{mean:.1%} ± {100 * deviation:.1f} points"
    return f"{shown(mean, unit)} ± {shown(deviation, unit)}"
