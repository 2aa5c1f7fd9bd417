"""The recurrent attention model on the data of `translated_digits`, with eight glimpses and without patch tokens.

python scripts/research/glimpse_model.py --config scripts/configs/compare/cluttered_mnist_60.yaml --steps 20000
python scripts/research/glimpse_model.py --config scripts/configs/compare/cluttered_mnist_60.yaml --steps 20000 --random

Trains `RamForImageClassification` (with `--random` the control, whose glimpses are at random locations) and adds its rows to
results/glimpse_models.json after each seed. `accuracy` is that of the likeliest locations, `accuracy_mc8` that of the mean prediction over
8 draws.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from hf_hardattn.backbones.ram import ESTIMATORS, RamConfig, RamForImageClassification
from hf_hardattn.devices import default_device
from hf_hardattn.training.comparison import Comparison
from hf_hardattn.training.results import read_json, write_json
from hf_hardattn.training.tasks import Base

WARM_UP = 100  # steps


def train(model: RamForImageClassification, task: Base, args: argparse.Namespace, seed: int) -> None:
    """Train for ``args.steps`` steps, and print the progress."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 1.0) * (1 - step / args.steps)
    )
    model.train()
    start = time.perf_counter()
    losses = right = torch.zeros((), device=model.device)
    painter = ThreadPoolExecutor(1)  # prepares the next batch while the GPU computes
    coming = painter.submit(task.draw, args.batch, generator)
    wide, narrow = args.sigma
    for step in range(1, args.steps + 1):
        model.config.sigma = wide + (narrow - wide) * step / args.steps  # explore, then exploit
        columns = send_to_device(coming.result(), model.device)
        coming = painter.submit(task.draw, args.batch, generator)
        output = model(**columns)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses = losses + output.loss.detach()  # stays on the device: reading it would synchronise
        right = right + (output.logits.argmax(-1) == columns["labels"]).float().mean()
        if step % args.every == 0 or step == args.steps:
            count = (step - 1) % args.every + 1
            seconds = time.perf_counter() - start
            print(
                f"seed {seed} step {step} loss {losses / count:.4f} accuracy {right / count:.4f} s {seconds:.0f}",
                flush=True,
            )
            losses = right = torch.zeros((), device=model.device)


@torch.no_grad()
def evaluate(model: RamForImageClassification, task: Base, draws: int = 8) -> dict[str, float]:
    """Accuracy on the test set of the task, for the likeliest locations and for the mean prediction over ``draws``."""
    model.eval()
    right = right_mean = total = 0
    for batch in task.test():
        inputs = batch.to(model.device).inputs
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        right += int((model(pixels).logits.argmax(-1) == labels).sum())
        mean = torch.stack([model(pixels, sample=True).logits.softmax(-1) for _ in range(draws)]).mean(0)
        right_mean += int((mean.argmax(-1) == labels).sum())
        total += len(labels)
    return {"accuracy": right / total, f"accuracy_mc{draws}": right_mean / total}


def add(path: Path, name: str, row: dict[str, Any]) -> None:
    """Add a row to those of the comparison ``name``; it replaces an earlier run of the same model."""
    results = read_json(path) if path.exists() else {}
    same = [
        field
        for field, value in row.items()
        if field not in ("command", "seconds", "device") and not field.startswith("accuracy")
    ]
    rows = [old for old in results.get(name, []) if any(old.get(field) != row[field] for field in same)]
    write_json(path, {**results, name: [*rows, row]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--glimpses", type=int, default=8)
    parser.add_argument("--scales", type=int, default=3)
    parser.add_argument("--estimator", choices=ESTIMATORS, default="reinforce")
    parser.add_argument("--random", action="store_true", help="the control: random places, also in training")
    parser.add_argument(
        "--sigma", type=float, nargs=2, default=(0.4, 0.1), help="standard deviation of the policy, first and last"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=500, help="steps between lines of progress")
    parser.add_argument(
        "--output", type=Path, default=Path("results/glimpse_models.json"), help="JSON file to add the results to"
    )
    args = parser.parse_args()
    task, _, _ = Comparison.read(args.config).settle()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        torch.manual_seed(seed)
        config = RamConfig(
            image_size=task.config().image_size,
            num_labels=task.config().num_labels,
            glimpses=args.glimpses,
            scales=args.scales,
            estimator=args.estimator,
            policy="random" if args.random else "gaussian",
        )
        model = RamForImageClassification(config).to(default_device())
        start = time.perf_counter()
        train(model, task, args, seed)
        row = {
            "command": shlex.join(["python", *sys.argv]),
            "model": "ram, random glimpses" if args.random else "ram",
            "estimator": None if args.random else args.estimator,
            "glimpses": args.glimpses,
            "scales": args.scales,
            "steps": args.steps,
            "batch": args.batch,
            "learning_rate": args.learning_rate,
            "sigma": None if args.random else args.sigma,
            "seconds": round(time.perf_counter() - start, 1),
            "seed": seed,
            "device": model.device.type,
            **evaluate(model, task),
        }
        print(row, flush=True)
        add(args.output, args.config.stem, row)


if __name__ == "__main__":
    main()
