"""Measure the saving of a hard run of `finetuning_runs.py` over the stock model with the same weights, on the test rows of the task.

    python scripts/research/finetuning_timing.py captioning retrieval

Writes `timing.json` to `outputs/TASK-hard-0`, where `finetuning_results.py` reads it. The times are medians of interleaved rounds; run it
on a quiet machine. It times the forward pass of a classifier, the generation of a text from pixels or tokens, and for a retriever the image
tower and the matching head on pairs, which is the cost of re-ranking.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from finetuning_runs import FAMILIES, folder

import hf_hardattn
from hf_hardattn.training import finetuning
from hf_hardattn.training.results import read_json, write_json

TOKENS = 8  # generated tokens
NOT_HERE = ("train_file", "vision_features", "freeze", "hard_attention", "sites", "recipe", "budget", "scorer")
NOT_HERE += ("estimator", "per_head")


def task_of(place: Path, rows: int) -> Any:
    """Return the task of a finished run with its trained model, on ``rows`` rows of its test data."""
    result = read_json(place / "results.json")
    kind = finetuning.load(result["task"])
    given = {field.name: result["arguments"][field.name] for field in fields(kind.Arguments)}
    given = {name: value for name, value in given.items() if name not in NOT_HERE}
    given |= {"model_name_or_path": str(place), "max_eval_samples": rows}
    return kind(kind.Arguments(**given), Accelerator(cpu=True)).setup()


def works(task: Any, model: Any, batch: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Return the timed calls by name."""
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in batch}
    if "retrieval" in task.name:
        tokens = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return {
            "image tower": lambda: model.vision_model(pixel_values=batch["pixel_values"]),
            "re-ranking": lambda: model.match(ids, mask, tokens),
        }
    if task.name == "image_classification":
        return {"forward": lambda: model(**inputs)}
    if "captioning" in task.name:
        inputs = {"pixel_values": inputs["pixel_values"]}
    return {"generate": lambda: model.generate(**inputs, min_new_tokens=TOKENS, max_new_tokens=TOKENS)}


@torch.no_grad()
def measure(place: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of each call, hard and stock, and the ratio of stock to hard."""
    task = task_of(place, rows)
    batch = task.collate([task.validation[i] for i in range(len(task.validation))])
    models = {"stock": hf_hardattn.remove(copy.deepcopy(task.model)).eval(), "hard": task.model.eval()}
    todo = {how: works(task, model, batch) for how, model in models.items()}
    times: dict[str, dict[str, list[float]]] = {work: {how: [] for how in models} for work in todo["hard"]}
    for turn in range(rounds + 1):
        for work, found in times.items():
            for how in models:
                started = time.perf_counter()
                todo[how][work]()
                if turn:  # the first turn warms up
                    found[how].append(time.perf_counter() - started)
    setting: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads(), "dtype": "float32"}
    setting |= {"shapes": {name: list(value.shape) for name, value in batch.items() if hasattr(value, "shape")}}
    if "generate" in times:
        setting["new_tokens"] = TOKENS
    works_found = {}
    for work, found in times.items():
        ratios = [stock / hard for stock, hard in zip(found["stock"], found["hard"], strict=True)]
        works_found[work] = {
            "seconds": {how: statistics.median(seconds) for how, seconds in found.items()},
            "stock_over_hard": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2] if rounds > 1 else None,
        }
    return {**setting, "rounds": rounds, "works": works_found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="+", choices=sorted(FAMILIES))
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds; one more warms up (default: 11)")
    parser.add_argument("--rows", type=int, default=16, help="rows per batch (default: 16)")
    arguments = parser.parse_args(argv)
    for task in arguments.task:
        place = folder(task, "hard", 0)
        found = measure(place, arguments.rows, arguments.rounds)
        write_json(place / "timing.json", found)
        shown = {work: round(row["stock_over_hard"], 2) for work, row in found["works"].items()}
        print(json.dumps({task: shown}), flush=True)


if __name__ == "__main__":
    main()
