"""The demo: three small ViTs find a digit among clutter - soft, hard, and a random choice of as many patches."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from ..config import HardAttentionConfig
from ..efficiency.counting import count_flops
from ..efficiency.timing import interleaved_seconds, speedups
from ..interpret.overlay import patch_overlay
from ..recording import record
from ..verify import verify
from . import tasks
from .cluttered_digits import SCENE
from .fitting import fit

SITE = "vision.inputs"


@dataclass(frozen=True)
class Recipe:
    """The demo's numbers. All three models train ``trunk_steps + branch_steps``; they share the soft trunk.

    Attributes:
        keep: patches kept of 64. anneal: share of the branch over which the budget falls from all patches to ``keep``.
        clutter: fragments an image; the trunk ramps up to it over ``ramp`` steps.
    """

    trunk_steps: int = 600
    branch_steps: int = 400
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    keep: int = 9
    anneal: float = 0.4
    clutter: int = 12
    ramp: int = 400
    test_images: int = 2000
    seed: int = 4


def run(recipe: Recipe, output: Path, threads: int | None = None) -> dict[str, Any]:
    """Train, compare, save, reload in a fresh process, draw; returns what it writes to ``output/results.json``.

    Args:
        recipe: the numbers. output: folder for models, picture and results. threads: of PyTorch; its own choice by default.
    """
    output.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()  # fresh selectors are expected here, and files are small
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    task = _task(recipe.test_images, recipe.clutter)
    pixels = next(task.test()).inputs["pixel_values"][:64]
    torch.manual_seed(recipe.seed)
    trunk = task.model_class(task.config())
    _train(trunk, task, recipe, "trunk")
    trunk.save_pretrained(output / "trunk")
    rows, models, tested = {}, {}, {}
    for name, hard_attention in (("soft", None), ("hard", hard_config(recipe)), ("random", random_config(recipe))):
        torch.manual_seed(recipe.seed + 1)
        model = AutoModelForImageClassification.from_pretrained(output / "trunk", hard_attention=hard_attention)
        started = time.perf_counter()
        _train(model, task, recipe, name)
        seconds = time.perf_counter() - started
        tested[name] = task.evaluate(model)
        rows[name] = {"train_seconds": seconds, "accuracy": tested[name]["accuracy"]}
        model.save_pretrained(output / name)
        models[name] = model.eval()
    rounds = _measure(models, pixels)
    ratios = speedups(rounds, "soft")
    for name, model in models.items():
        rows[name] |= {
            "kept": 1.0 if name == "soft" else recipe.keep / 64,
            "gflops": count_flops(model, {"pixel_values": pixels[:1]}) / 1e9,
            "images_per_second": 64 / statistics.median(rounds[name]),
            "speedup": ratios[name],
        }
    report = verify(models["hard"], {"pixel_values": pixels[:32]})
    results = {
        "command": "hf-hardattn demo",
        "recipe": asdict(recipe),
        "models": rows,
        "certificate": report.to_dict(),
        "reload": _reload(output / "hard", recipe, rows["hard"]["accuracy"]),
        "found": tested["hard"]["recall"],
        "measured": {
            "device": "cpu",
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "batch": 64,
            "dtype": "float32",
            "rounds": len(rounds["soft"]),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": time.perf_counter() - began,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _draw(models["hard"], task, rows, output / "kept_patches.png")
    return results


def hard_config(recipe: Recipe) -> HardAttentionConfig:
    """The recommended recipe: a scorer that sees neighbours, a deterministic choice, exact marginals as its gradient, an annealed budget."""
    return HardAttentionConfig(
        sites=[SITE],
        scorer="conv",
        estimator="simple",
        estimator_options={"sample": False},
        budget=_annealed(recipe),
    )


def random_config(recipe: Recipe) -> HardAttentionConfig:
    """The control: as many patches, as annealed, chosen at random."""
    return HardAttentionConfig(sites=[SITE], scorer="random", estimator="straight_through", budget=_annealed(recipe))


def _annealed(recipe: Recipe) -> dict[str, Any]:
    return {"start": 1.0, "end": recipe.keep / 64, "steps": max(1, int(recipe.anneal * recipe.branch_steps))}


def _task(images: int, clutter: int) -> tasks.Base:
    return tasks.load("cluttered_digits", {"test_images": images, "clutter": clutter, "layers": 3, "heads": 4})


def _train(model: Any, task: tasks.Base, recipe: Recipe, name: str) -> None:
    branch = name != "trunk"
    steps = recipe.branch_steps if branch else recipe.trunk_steps
    numbers = tasks.Recipe(
        trunk_steps=recipe.trunk_steps,
        branch_steps=recipe.branch_steps,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        ramp=recipe.ramp / recipe.trunk_steps,
    )
    with tqdm(total=steps, desc=f"{name:>6}", unit="step", mininterval=1.0) as bar:

        def tell(step: int, loss: float) -> None:
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss:.2f}")

        fit(model, task, numbers, seed=recipe.seed + (1000 if branch else 0), branch=branch, tell=tell)


def _measure(models: dict[str, nn.Module], pixels: Tensor) -> dict[str, list[float]]:
    def call(model: nn.Module) -> Any:
        with torch.inference_mode():
            return model(pixel_values=pixels)

    return interleaved_seconds({name: partial(call, model) for name, model in models.items()}, rounds=31)


def _reload(folder: Path, recipe: Recipe, expected: float) -> dict[str, Any]:
    """Load the saved hard model in a fresh process, from its config alone, and test it again."""
    code = "import sys; from hf_hardattn.training.demo import check; check(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    arguments = [sys.executable, "-c", code, str(folder), str(recipe.test_images), str(recipe.clutter)]
    answer = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return {**answer, "same_accuracy": answer["accuracy"] == expected}


def check(folder: str, images: int, clutter: int) -> None:
    """What the fresh process runs; prints JSON."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    task = _task(images, clutter)
    score = task.evaluate(model)["accuracy"]
    with record(model) as selections, torch.no_grad():
        model(pixel_values=next(task.test()).inputs["pixel_values"][:8])
    kept = selections[SITE][0].slots - 1  # CLS is there always and is no choice
    print(json.dumps({"accuracy": score, "patches_kept": kept, "hard": model.config.hard_attention is not None}))


@torch.no_grad()
def _draw(model: nn.Module, task: tasks.Base, rows: dict[str, Any], path: Path) -> None:
    pixels, labels = (next(task.test()).inputs[name][:18] for name in ("pixel_values", "labels"))
    with record(model) as selections:
        predicted = model(pixel_values=pixels).logits.argmax(-1)
    titles = [f"{p}" if p == y else f"{p} (is {y})" for p, y in zip(predicted.tolist(), labels.tolist(), strict=True)]
    caption = f"The model computed on the lit patches only ({rows['hard']['kept']:.0%}); above each image, what it read there."
    patch_overlay(pixels, selections[SITE][0], SCENE.patch, titles, columns=6, caption=caption).savefig(path, dpi=150)
