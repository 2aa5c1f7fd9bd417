"""Measure the cost of training, in seconds and FLOPs, until a model is as good as with full attention, for several estimators.

    python scripts/research/training_time.py --seeds 0 1 2          # on a machine that does nothing else

A ViT learns cluttered digits on 100x100 pixels with full attention, up to a point where it still improves. All variants continue from there
with equal data and steps, in turns of a few steps, so that other work of the machine slows all of them equally. Tests are not timed. Seeds
that are already in the output are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ViTForImageClassification

import hf_hardattn
from hf_hardattn.efficiency.counting import count_training_flops
from hf_hardattn.training import tasks
from hf_hardattn.training.fitting import fit
from hf_hardattn.training.results import describe_run, write_json

VARIANTS: dict[str, dict[str, Any] | None] = {
    "soft": None,
    "robust": {"recipe": "robust"},
    "cropr": {"estimator": "cropr"},
    "rloo": {"estimator": "rloo"},
    "reinforce": {"estimator": "reinforce", "baseline": "leave_one_out"},
    "random": {"estimator": "reinforce", "scorer": "random"},
}
TURN = 10  # steps of a variant before the turn of the next one


class Run:
    """One variant in training.

    Attributes:
        seconds, processor: wall-clock and processor time of its steps. curve: steps, seconds and accuracy at each test.
    """

    def __init__(self, name: str, base: Path, task: tasks.Base, steps: int, seed: int) -> None:
        self.name, self.task, self.steps, self.step = name, task, steps, 0
        self.seconds = self.processor = 0.0
        self.curve: list[dict[str, float]] = []
        torch.manual_seed(seed + 1)
        settings = VARIANTS[name]
        hard = None if settings is None else {"sites": [task.site], "budget": task.budget, **settings}
        self.model = ViTForImageClassification.from_pretrained(base, hard_attention=hard)
        self.batches = torch.Generator().manual_seed(seed + 1000)
        recipe = task.recipe
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / recipe.branch_warmup) * (1 - step / steps)
        )

    def take_turn(self) -> None:
        """Train ``TURN`` steps."""
        self.model.train()
        drawn = [self.task.draw(self.task.recipe.batch, self.batches) for _ in range(TURN)]
        started, processor = time.perf_counter(), time.process_time()
        for batch in drawn:
            hf_hardattn.set_step(self.model, self.step, self.steps)
            self.optimizer.zero_grad()
            self.model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
        self.seconds += time.perf_counter() - started
        self.processor += time.process_time() - processor

    def test(self) -> None:
        """Add a point to the curve."""
        accuracy = self.task.evaluate(self.model)["accuracy"]
        self.curve.append(
            {"step": self.step, "seconds": self.seconds, "processor": self.processor, "accuracy": accuracy}
        )


def train_base(task: tasks.Base, args: argparse.Namespace, seed: int) -> Path:
    """Return the checkpoint of a seed; train it with full attention if it does not exist."""
    place = args.work / f"base-{seed}"
    if not (place / "config.json").is_file():
        config: Any = task.config()
        config.hidden_size, config.intermediate_size = args.width, 2 * args.width
        config.num_hidden_layers = config.num_attention_heads = args.layers
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
        fit(model, task, task.recipe, seed=seed, branch=False)
        model.save_pretrained(place)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=400, help="steps of each variant")
    parser.add_argument("--every", type=int, default=50, help="steps between tests")
    parser.add_argument("--width", type=int, default=96, help="width of the ViT")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("outputs/training_time"), help="folder for the checkpoints")
    parser.add_argument("--output", type=Path, default=Path("outputs/training_time.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = tasks.load("cluttered_digits_100")
    rows: list[dict[str, Any]] = json.loads(args.output.read_text())["rows"] if args.output.is_file() else []
    for seed in sorted(set(args.seeds) - {row["seed"] for row in rows}):
        base = train_base(task, args, seed)
        runs = [Run(name, base, task, args.steps, seed) for name in args.variants]
        batch = task.draw(task.recipe.batch, torch.Generator().manual_seed(seed))
        flops = {run.name: count_training_flops(run.model, batch, args.steps) for run in runs}
        for done in range(0, args.steps, TURN):
            for run in runs:
                if done % args.every == 0:
                    run.test()
                run.take_turn()
        for run in runs:
            run.test()
            rows.append(
                {
                    "seed": seed,
                    "variant": run.name,
                    "gflops_a_step": flops[run.name] / args.steps / 1e9,
                    "curve": run.curve,
                }
            )
            print(seed, run.name, run.curve[-1], flush=True)
        settings = {key: getattr(args, key) for key in ("steps", "every", "width", "layers")}
        write_json(args.output, {"rows": rows, "settings": settings, "threads": 1, **describe_run(None)})


if __name__ == "__main__":
    main()
