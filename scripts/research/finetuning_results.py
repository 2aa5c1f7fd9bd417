"""Compare the runs of `finetuning_runs.py`: write `results/finetuning/TASK.json` with every finished variant and seed.

    python scripts/research/finetuning_results.py captioning translation_de
    python scripts/research/finetuning_timing.py captioning            # run this first to include the speed; on a quiet machine

The target is that hard loses at most half a point to soft (accuracy, BLEU, ROUGE-L, recall in percent; CIDEr in tens) in the mean over the
seeds. The weights of the hard run are also evaluated soft, which separates the cost of the selection from that of the training.
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

from finetuning_runs import FAMILIES, folder

from hf_hardattn.training.results import read_json, write_json

TARGET = 0.5  # most points that hard may lose
POINTS = {  # task of the script: metric of the target, and factor that converts it to points
    "image_classification": ("accuracy", 100.0),
    "captioning": ("cider_regex_tokens", 0.1),
    "video_captioning": ("exact_match", 1.0),
    "image_text_retrieval": ("mean_recall", 1.0),
    "video_text_retrieval": ("mean_recall", 1.0),
    "translation": ("bleu", 1.0),
    "summarisation": ("rougeL", 1.0),
}


def read(place: Path) -> dict[str, Any] | None:
    """Read the record of a run; None if it has not finished."""
    path = place / "results.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = read_json(path)
    result["command"] = "python " + re.sub(r"^\S*scripts/", "scripts/", result["command"])
    for metrics in result["metrics"].values():
        recalls = [value for name, value in metrics.items() if re.match(r"(image|text)_to_\w+_recall@", name)]
        if recalls:
            metrics["mean_recall"] = sum(recalls) / len(recalls)
        if "kept_ratio" in metrics:
            metrics["kept"] = statistics.mean(metrics.pop("kept_ratio").values())
    return result


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the spread of each metric over the seeds."""
    names = [name for name, value in rows[0].items() if isinstance(value, (int, float))]
    return {name: spread([row[name] for row in rows]) for name in names}


def side_by_side(task: str, root: Path = Path("outputs")) -> dict[str, Any]:
    """Return all results of a task's runs.

    Raises:
        SystemExit: no hard run has finished, or the variants had different numbers of steps.
    """
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for variant in ("soft", "hard", "random"):
        found = {seed: read(folder(task, variant, seed, root)) for seed in range(10)}
        runs[variant] = {seed: result for seed, result in found.items() if result is not None}
    if not runs["hard"]:
        raise SystemExit(f"no run under {folder(task, 'hard', 0, root)}; make it with finetuning_runs.py {task}")
    steps = {result["train"]["steps"] for variant in runs.values() for result in variant.values()}
    if len(steps) > 1:
        raise SystemExit(f"the runs of {task} have {sorted(steps)} steps; compare equal ones")
    base, first = read(folder(task, "base", 0, root)), next(iter(runs["hard"].values()))
    metric, points = POINTS[first["task"]]
    shown = {
        "soft": [result["metrics"]["soft"] for result in runs["soft"].values()],
        "hard": [result["metrics"]["hard"] for result in runs["hard"].values()],
        "hard run, soft": [result["metrics"]["soft"] for result in runs["hard"].values()],
        "random": [result["metrics"]["hard"] for result in runs["random"].values()],
        "trunk": [] if base is None else [base["metrics"]["soft"]],
    }
    both = sorted(runs["soft"].keys() & runs["hard"].keys())
    lost = [
        points * (runs["hard"][seed]["metrics"]["hard"][metric] - runs["soft"][seed]["metrics"]["soft"][metric])
        for seed in both
    ]
    commands = {variant: next(iter(found.values()))["command"] for variant, found in runs.items() if found}
    if base is not None:
        commands = {"trunk": base["command"], **commands}
    found_at = folder(task, "hard", min(runs["hard"]), root) / "timing.json"
    return {
        "task": first["task"],
        "seeds": {variant: list(found) for variant, found in runs.items()},
        "steps": {"trunk": None if base is None else base["train"]["steps"], "branch": steps.pop()},
        "batch": first["train"]["batch"],
        "metric": metric,
        "points_per_unit": points,
        "hard_minus_soft": spread(lost) if lost else None,
        "target": {"points": TARGET, "held": bool(lost) and statistics.mean(lost) >= -TARGET},
        "arms": {variant: over_seeds(rows) for variant, rows in shown.items() if rows},
        "timing": read_json(found_at) if found_at.is_file() else None,
        "hard_attention": first["hard_attention"],
        "commands": commands,
        "data": first["data"],
        "versions": first["versions"],
        "platform": first["platform"],
        "device": first["device"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="+", choices=sorted(FAMILIES))
    parser.add_argument("--output", type=Path, default=Path("results/finetuning"), help="folder of the JSON files")
    arguments = parser.parse_args(argv)
    for task in arguments.task:
        found = side_by_side(task)
        write_json(arguments.output / f"{task}.json", found)
        means = {variant: round(row[found["metric"]]["mean"], 3) for variant, row in found["arms"].items()}
        lost = found["hard_minus_soft"]
        print(
            f"{task}: {found['metric']} {means}, hard - soft {lost and round(lost['mean'], 2)} points; {found['target']}"
        )


if __name__ == "__main__":
    main()
