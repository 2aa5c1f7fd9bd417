"""The baselines of the glimpse models' paper on the data of `translated_digits`: they look at the whole image.

python scripts/whole_image_baselines.py --config scripts/configs/compare/cluttered_mnist_60.yaml

Trains FC-256 and a convolutional network of one layer of 16 filters 10x10 with stride 5 and 256 hidden units as often as the comparison
trains its models (trunk and branch), and adds them to the JSON of its results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hf_hardattn.devices import default_device
from hf_hardattn.training.comparison import Comparison
from hf_hardattn.training.results import read_json, write_json
from hf_hardattn.training.tasks import Base


def networks(canvas: int) -> dict[str, nn.Module]:
    """The two kinds of baseline of Mnih et al. 2014, arXiv:1406.6247."""
    side = (canvas - 10) // 5 + 1
    convolution = nn.Sequential(nn.Conv2d(1, 16, 10, 5), nn.ReLU(), nn.Flatten())
    return {
        "FC-256": nn.Sequential(nn.Flatten(), nn.Linear(canvas * canvas, 256), nn.ReLU(), nn.Linear(256, 10)),
        "convolutional": nn.Sequential(convolution, nn.Linear(16 * side * side, 256), nn.ReLU(), nn.Linear(256, 10)),
    }


def brightness(pixels: Tensor) -> Tensor:
    """From 0, the background, to 1: with thousands of inputs at -1 the fully connected network does not start to learn."""
    return (pixels + 1) / 2


def train(model: nn.Module, task: Base, steps: int, batch: int, seed: int) -> float:
    """Train and return the accuracy on the task's test set."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        columns = send_to_device(task.draw(batch, generator), default_device())
        loss = nn.functional.cross_entropy(model(brightness(columns["pixel_values"])), columns["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    right = total = 0
    with torch.no_grad():
        for batch_ in task.test():
            inputs = batch_.to(default_device()).inputs
            labels = inputs["labels"]
            right += int((model(brightness(inputs["pixel_values"])).argmax(-1) == labels).sum())
            total += len(labels)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    task, recipe, _ = Comparison.read(args.config).settle()
    path = Path("results/compare") / f"{args.config.stem}.json"
    results = read_json(path)
    found: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        for name, model in networks(task.config().image_size).items():
            found.setdefault(name, []).append(
                train(model.to(default_device()), task, recipe.trunk_steps + recipe.branch_steps, recipe.batch, seed)
            )
            print(name, seed, found[name][-1], flush=True)
    write_json(path, {**results, "whole_image_baselines": found})


if __name__ == "__main__":
    main()
