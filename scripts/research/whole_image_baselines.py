"""The baselines of the glimpse models' paper on the data of `translated_digits`, which read the whole image.

python scripts/research/whole_image_baselines.py --config scripts/configs/compare/cluttered_mnist_60.yaml
python scripts/research/whole_image_baselines.py --config scripts/configs/compare/cluttered_mnist_100.yaml --steps 8000 --batch 128

Trains FC-256 and a convolutional network with one layer of 16 filters of 10x10 pixels with stride 5 and 256 hidden units, and adds them to
the results JSON of the comparison.
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
    """Return the two kinds of baseline networks of Mnih et al. 2014, arXiv:1406.6247."""
    side = (canvas - 10) // 5 + 1
    convolution = nn.Sequential(nn.Conv2d(1, 16, 10, 5), nn.ReLU(), nn.Flatten())
    return {
        "FC-256": nn.Sequential(nn.Flatten(), nn.Linear(canvas * canvas, 256), nn.ReLU(), nn.Linear(256, 10)),
        "convolutional": nn.Sequential(convolution, nn.Linear(16 * side * side, 256), nn.ReLU(), nn.Linear(256, 10)),
    }


def brightness(pixels: Tensor) -> Tensor:
    """Scale pixels to [0, 1] with background 0: with thousands of inputs at -1 the fully connected network does not start to learn."""
    return (pixels + 1) / 2


def train(models: dict[str, nn.Module], task: Base, steps: int, batch: int, seed: int) -> dict[str, float]:
    """Train the models on the same images, and return the accuracy of each on the test set of the task."""
    generator = torch.Generator().manual_seed(seed)
    parts = nn.ModuleDict(models).to(default_device())  # they share no weights, so AdamW treats them independently
    optimizer = torch.optim.AdamW(parts.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        columns = send_to_device(task.draw(batch, generator), default_device())
        pixels, labels = brightness(columns["pixel_values"]), columns["labels"]
        loss = torch.stack([nn.functional.cross_entropy(model(pixels), labels) for model in models.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    right, total = dict.fromkeys(models, 0), 0
    with torch.no_grad():
        for batch_ in task.test():
            inputs = batch_.to(default_device()).inputs
            pixels, labels = brightness(inputs["pixel_values"]), inputs["labels"]
            for name, model in models.items():
                right[name] += int((model(pixels).argmax(-1) == labels).sum())
            total += len(labels)
    return {name: count / total for name, count in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, help="default: the steps of the comparison's base checkpoint plus those of a branch"
    )
    parser.add_argument("--batch", type=int, help="default: the comparison's")
    args = parser.parse_args()
    task, recipe, _ = Comparison.read(args.config).settle()
    steps, batch = args.steps or recipe.trunk_steps + recipe.branch_steps, args.batch or recipe.batch
    path = Path("results/compare") / f"{args.config.stem}.json"
    found: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        for name, accuracy in train(networks(task.config().image_size), task, steps, batch, seed).items():
            found.setdefault(name, []).append(accuracy)
            print(name, seed, accuracy, flush=True)
    trained = {"steps": steps, "batch": batch}
    write_json(path, {**read_json(path), "whole_image_baselines": found, "whole_image_baselines_trained": trained})


if __name__ == "__main__":
    main()
