"""Create scenes of one whole garment among fragments of others, as image files with labels.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb outputs/fashion
    FASHION_MNIST=outputs/fashion/usr/share/datasets/fashion-mnist python scripts/data/prepare_cluttered_fashion.py

These are the scenes of the task cluttered_fashion of `hf-hardattn compare`: 84x84 pixels, of which the garment fills 2x2 of 6x6 patches of
14 pixels. Training scenes are drawn from Fashion-MNIST's training images, the other splits from two halves of its test images.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from hf_hardattn.training.cluttered import draw_scenes
from hf_hardattn.training.tasks.cluttered_fashion import ClutteredFashion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/data/cluttered-fashion"), help="folder")
    parser.add_argument("--train", type=int, default=6000, help="training scenes (default: 6000)")
    parser.add_argument("--held-out", type=int, default=1000, help="scenes of test and of validation (default: 1000)")
    arguments = parser.parse_args()
    task = ClutteredFashion()
    train, test = task.bank("train"), task.bank("test")
    half = len(test.labels) // 2
    banks = {
        "train": train,
        "test": replace(test, images=test.images[:, :half], labels=test.labels[:half]),
        "validation": replace(test, images=test.images[:, half:], labels=test.labels[half:]),
    }
    for seed, (part, bank) in enumerate(banks.items()):
        count = arguments.train if part == "train" else arguments.held_out
        generator = torch.Generator().manual_seed(seed)
        scenes = draw_scenes(bank, task.scene, count, task.clutter, generator)
        pixels = ((scenes["pixel_values"][:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
        (arguments.output / part).mkdir(parents=True, exist_ok=True)
        rows = []
        for i, label in enumerate(tqdm(scenes["labels"].tolist(), desc=part)):
            Image.fromarray(pixels[i]).save(arguments.output / part / f"{i}.png")
            rows.append({"image": f"{part}/{i}.png", "label": task.names[label]})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.output / f"{part}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
