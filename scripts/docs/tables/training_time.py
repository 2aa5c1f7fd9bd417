"""What training costs until it is as good as full attention."""

from __future__ import annotations

from statistics import mean
from typing import Any

from . import read

LOST = 0.005  # of the final accuracy with full attention, that the target leaves out


def table() -> str:
    """One row a variant, means over the seeds, and under them how they were measured."""
    r = read("training_time.json")
    lines = [
        "| variant | accuracy at the end | training, s | × full attention | GFLOPs per step (counted) | s to within 0.5 points of full attention | GFLOPs until then |",
        "|---" * 7 + "|",
    ]
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for row in r["rows"]:
        by_variant.setdefault(row["variant"], []).append(row)
    targets = {row["seed"]: row["curve"][-1]["accuracy"] - LOST for row in by_variant["soft"]}
    whole = mean(row["curve"][-1]["processor"] for row in by_variant["soft"])
    for name, rows in by_variant.items():
        ends = [row["curve"][-1] for row in rows]
        reached = [(row, point) for row in rows if (point := _first(row["curve"], targets[row["seed"]]))]
        seconds = mean(end["processor"] for end in ends)
        until = ["", ""]
        if len(reached) == len(rows):
            until[0] = f"{mean(point['processor'] for _, point in reached):.0f}"
            until[1] = f"{mean(point['step'] * row['gflops_a_step'] for row, point in reached):,.0f}"
        elif reached or name != "random":
            until[0] = f"in {len(reached)} of {len(rows)} runs"
        accuracy = f"{100 * mean(end['accuracy'] for end in ends):.1f}"
        step = f"{mean(row['gflops_a_step'] for row in rows):.2f}"
        lines.append(
            f"| `{name}` | {accuracy} | {seconds:.0f} | {seconds / whole:.2f} | {step} | {' | '.join(until)} |"
        )
    settings = r["settings"]
    lines += [
        "",
        f"Cluttered digits 100x100 with 12 % of 100 patches kept at `vision.inputs`, and a ViT of {settings['layers']} layers and width {settings['width']}; {len(targets)} {'seed,' if len(targets) == 1 else 'seeds, each with'} "
        f"{settings['steps']} steps of batch 32 from one checkpoint that was trained with full attention and was still improving. Times are seconds on one core "
        f"without the tests; the variants ran in turns of ten steps, and other jobs ran on the machine. The models were tested every {settings['every']} steps "
        "(`python scripts/research/training_time.py`).",
    ]
    return "\n".join(lines)


def _first(curve: list[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The first test that reached ``target``."""
    return next((point for point in curve if point["accuracy"] >= target), None)
