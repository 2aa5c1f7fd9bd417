"""Create the sample model of the package from the model that `hf-hardattn demo` trained.

    hf-hardattn demo --threads 1 --output outputs/demo
    python scripts/research/make_sample.py outputs/demo

Writes hf_hardattn/sample/ (the hard model for RGB images, its image processor, two test images) and results/sample.json (its training and
its accuracy on the test images; `make demo` measures the speed).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import hf_hardattn
from hf_hardattn import sample
from hf_hardattn.training import tasks
from hf_hardattn.training.cluttered_digits import ClutteredDigits

ROOT = Path(__file__).resolve().parents[2]
KEPT_OF_RESULTS = ("recipe", "found", "certificate", "reload", "training", "versions")
SPEEDS = ("images_per_second", "speedup", "train_seconds")
DIGITS = (3, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `hf-hardattn demo`")
    arguments = parser.parse_args()
    demo = json.loads((arguments.demo / "results.json").read_text())
    model = in_colour(hf_hardattn.load(arguments.demo / "hard", budget=demo["recipe"]["keep"]))
    write_model(model)
    write_images(ClutteredDigits("test", size=64, clutter=12, seed=1))
    write_results(demo, accuracy(model, demo["recipe"]))


def in_colour(model: ViTForImageClassification) -> ViTForImageClassification:
    """Convert the model to RGB images, which pipelines produce: each of the three equal channels carries a third of the weight."""
    config = ViTConfig.from_dict({**model.config.to_dict(), "num_channels": 3})
    coloured = ViTForImageClassification(config).eval()
    weights = model.state_dict()
    name = "vit.embeddings.patch_embeddings.projection.weight"
    weights[name] = weights[name].expand(-1, 3, -1, -1) / 3
    coloured.load_state_dict(weights)
    return coloured


@torch.no_grad()
def accuracy(model: ViTForImageClassification, recipe: dict[str, Any]) -> float:
    """Accuracy of the model on the demo's test images."""
    task = tasks.load("cluttered_digits", {"test_images": recipe["test_images"], "clutter": recipe["clutter"]})
    right = []
    for batch in task.test():
        logits = model(pixel_values=batch.inputs["pixel_values"].expand(-1, 3, -1, -1)).logits
        right.append((logits.argmax(-1) == batch.inputs["labels"]).float())
    return float(torch.cat(right).mean())


def write_model(model: ViTForImageClassification) -> None:
    """Save the model with an image processor that scales pixels to [-1, 1] as in the training."""
    if sample.folder().exists():
        shutil.rmtree(sample.folder())
    hf_hardattn.save(model, sample.folder())
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(sample.folder())
    for path in sample.folder().iterdir():
        path.chmod(0o644)


def write_images(scenes: ClutteredDigits) -> None:
    """Write the first scene of each of ``DIGITS``, named after its digit."""
    folder = sample.folder().parent / "images"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    for digit in DIGITS:
        scene = next(scene for scene in scenes if int(scene["labels"]) == digit)
        grey = ((scene["pixel_values"][0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        image = Image.frombytes("L", (64, 64), grey.numpy().tobytes()).convert("RGB")
        image.save(folder / f"digit_{digit}.png")


def write_results(demo: dict[str, Any], sample_accuracy: float) -> None:
    models = {
        name: {key: value for key, value in row.items() if key not in SPEEDS} for name, row in demo["models"].items()
    }
    results = {
        "command": [
            "hf-hardattn demo --threads 1 --output outputs/demo",
            "python scripts/research/make_sample.py outputs/demo",
        ],
        "hf_hardattn": hf_hardattn.__version__,
        "models": models,
        "sample_accuracy": sample_accuracy,
        "bytes": (sample.folder() / "model.safetensors").stat().st_size,
        **{key: demo[key] for key in KEPT_OF_RESULTS},
    }
    (ROOT / "results" / "sample.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
