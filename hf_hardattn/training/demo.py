"""The demo: three small ViTs find a digit among clutter - soft, hard, and with a random selection of the same size."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from ..config import HardAttentionConfig
from ..inspection.overlay import patch_overlay
from ..recording import record
from . import tasks, variants
from .cluttered_digits import SCENE

SITE = "vision.inputs"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the demo. All three models train ``trunk_steps + branch_steps`` and share the soft base checkpoint.

    Attributes:
        keep: patches kept of 64. anneal: share of the branch over which the budget falls from all patches to ``keep``.
        clutter: fragments per image; the base checkpoint's training ramps up to it over ``ramp`` steps.
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
    """Train, compare, save, reload in a fresh process and draw; return the content of ``output/results.json``.

    Args:
        recipe: the hyperparameters. output: folder for models, picture and results. threads: PyTorch threads; PyTorch's default if None.
    """
    output.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()  # fresh selectors are expected here, and files are small
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    options = {"test_images": recipe.test_images, "clutter": recipe.clutter, "layers": 3, "heads": 4}
    numbers = tasks.Recipe(
        trunk_steps=recipe.trunk_steps,
        branch_steps=recipe.branch_steps,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        ramp=recipe.ramp / recipe.trunk_steps,
    )
    hard = {"hard": hard_config(recipe), "random": random_config(recipe)}
    with _bars() as on_step:
        found, models = variants.run("cluttered_digits", options, numbers, hard, recipe.seed, output, on_step)
    seconds = time.perf_counter() - began
    results = {"command": "hf-hardattn demo", "recipe": asdict(recipe), **found, "seconds": seconds}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _draw(models["hard"], tasks.load("cluttered_digits", options), found["models"], output / "kept_patches.png")
    return results


def hard_config(recipe: Recipe) -> HardAttentionConfig:
    """The recommended recipe: a scorer that sees neighbours, deterministic selection with exact marginals as gradient, annealed budget."""
    return HardAttentionConfig(
        sites=[SITE],
        scorer="conv",
        estimator="simple",
        estimator_options={"sample": False},
        budget=_annealed(recipe),
    )


def random_config(recipe: Recipe) -> HardAttentionConfig:
    """The control: random selection with the same annealed budget."""
    return HardAttentionConfig(sites=[SITE], scorer="random", estimator="straight_through", budget=_annealed(recipe))


def _annealed(recipe: Recipe) -> dict[str, Any]:
    return {"start": 1.0, "end": recipe.keep / 64, "steps": max(1, int(recipe.anneal * recipe.branch_steps))}


@contextmanager
def _bars() -> Iterator[variants.OnStep]:
    """A progress bar for each model."""
    bars: dict[str, Any] = {}

    def on_step(name: str, step: int, steps: int, loss: float) -> None:
        if name not in bars:
            bars[name] = tqdm(total=steps, desc=f"{name:>6}", unit="step", mininterval=1.0)
        bars[name].update()
        if step % 20 == 0:
            bars[name].set_postfix(loss=f"{loss:.2f}", refresh=False)  # a refresh here would show a meaningless rate
        if step + 1 == steps:
            bars[name].close()

    try:
        yield on_step
    finally:
        for bar in bars.values():
            bar.close()


@torch.no_grad()
def _draw(model: nn.Module, task: tasks.Base, rows: dict[str, Any], path: Path) -> None:
    pixels, labels = (next(task.test()).inputs[name][:18] for name in ("pixel_values", "labels"))
    with record(model) as selections:
        predicted = model(pixel_values=pixels).logits.argmax(-1)
    titles = [f"{p}" if p == y else f"{p} (is {y})" for p, y in zip(predicted.tolist(), labels.tolist(), strict=True)]
    caption = f"The model computed only on the lit patches ({rows['hard']['kept']:.0%}); above each image: its answer."
    patch_overlay(pixels, selections[SITE][0], SCENE.patch, titles, columns=6, caption=caption).savefig(path, dpi=150)
