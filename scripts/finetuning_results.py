"""Put a hard and a soft run of a training script side by side, with the speed of both.

python scripts/finetuning_results.py --hard outputs/captioning-hard-0 --soft outputs/captioning-soft-0 --output results/finetuning/captioning.json

The hard run's weights are also shown soft: what the choice costs, with the training's share taken out. Speed is the time of a batch's
generation from images, hard against the stock model with the same weights, interleaved, medians; run it on a quiet machine, or leave it
out (--rounds 0).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import hf_hardattn
from hf_hardattn.training.finetuning import load
from hf_hardattn.training.results import write_json


def read(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results["command"] = "python " + re.sub(r"^\S*scripts/", "scripts/", results["command"])
    return results


def speed(folder: Path, size: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Seconds to caption random images of ``size``, hard and by the stock model with the same weights."""
    task = load(json.loads((folder / "results.json").read_text(encoding="utf-8"))["task"])
    models = {how: task.model_class.from_pretrained(folder).eval() for how in ("hard", "stock")}
    hf_hardattn.remove(models["stock"])
    pixels = torch.randn(size, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {how: [] for how in models}
    for turn in range(rounds + 1):
        for how, model in models.items():
            started = time.perf_counter()
            model.generate(pixel_values=pixels, min_new_tokens=8, max_new_tokens=8)
            if turn:  # the first warms up
                times[how].append(time.perf_counter() - started)
    seconds = {how: statistics.median(found) for how, found in times.items()}
    ratio = statistics.median(stock / hard for stock, hard in zip(times["stock"], times["hard"], strict=True))
    setting = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "shape": list(size),
        "new_tokens": 8,
    }
    return {**setting, "rounds": rounds, "seconds": seconds, "stock_over_hard": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hard", type=Path, required=True, help="output folder of the hard run")
    parser.add_argument("--soft", type=Path, help="output folder of the soft run with as many steps")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=0, help="of the timing (default: 0, none)")
    parser.add_argument("--batch", type=int, default=8, help="images of the timing (default: 8)")
    arguments = parser.parse_args()
    hard, soft = read(arguments.hard), read(arguments.soft) if arguments.soft else None
    found: dict[str, Any] = {
        "task": hard["task"],
        "seed": hard["arguments"]["seed"],
        "steps": hard["train"]["steps"],
        "hard_attention": hard["hard_attention"],
        "hard": hard["metrics"]["hard"],
        "hard_run_soft": hard["metrics"]["soft"],
        "commands": {"hard": hard["command"]},
        "versions": hard["versions"],
        "platform": hard["platform"],
    }
    if soft is not None:
        if soft["train"]["steps"] != hard["train"]["steps"]:
            raise SystemExit(
                f"{arguments.soft} has {soft['train']['steps']} steps and {arguments.hard} {hard['train']['steps']}; compare equal ones"
            )
        found["soft"], found["commands"]["soft"] = soft["metrics"]["soft"], soft["command"]
    if arguments.rounds:
        sizes = json.loads((arguments.hard / "config.json").read_text(encoding="utf-8"))["vision_config"]
        frames = [hard["arguments"]["num_frames"]] if hard["arguments"].get("num_frames") else []
        shape = (arguments.batch, *frames, 3, sizes["image_size"], sizes["image_size"])
        found["speed"] = speed(arguments.hard, shape, arguments.rounds)
    write_json(arguments.output, found)
    print(json.dumps({how: found[how] for how in ("hard", "hard_run_soft", "soft", "speed") if how in found}, indent=2))


if __name__ == "__main__":
    main()
