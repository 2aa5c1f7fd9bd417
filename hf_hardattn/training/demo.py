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
from transformers import AutoConfig, AutoModelForImageClassification

from ..config import HardAttentionConfig
from ..efficiency.counting import count_flops
from ..efficiency.timing import interleaved_seconds, speedups
from ..interpret.overlay import patch_overlay
from ..recording import record
from ..registration import set_step
from ..verify import verify
from .cluttered_digits import PATCH, ClutteredDigits, sample_batch

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
    test = ClutteredDigits("test", recipe.test_images, recipe.clutter, seed=1234).columns
    _trunk(recipe).save_pretrained(output / "trunk")
    rows, models = {}, {}
    for name, hard_attention in (("soft", None), ("hard", hard_config(recipe)), ("random", random_config(recipe))):
        torch.manual_seed(recipe.seed + 1)
        model = AutoModelForImageClassification.from_pretrained(output / "trunk", hard_attention=hard_attention)
        started = time.perf_counter()
        _train(model, recipe, recipe.branch_steps, name, decay=True, clutter=lambda step: recipe.clutter)
        rows[name] = {"train_seconds": time.perf_counter() - started, "accuracy": accuracy(model, test)}
        model.save_pretrained(output / name)
        models[name] = model.eval()
    seconds = _measure(models, test)
    ratios = speedups(seconds, "soft")
    for name, model in models.items():
        rows[name] |= {
            "kept": 1.0 if name == "soft" else recipe.keep / 64,
            "gflops": count_flops(model, {"pixel_values": test["pixel_values"][:1]}) / 1e9,
            "images_per_second": 64 / statistics.median(seconds[name]),
            "speedup": ratios[name],
        }
    report = verify(models["hard"], {"pixel_values": test["pixel_values"][:32]})
    results = {
        "command": "hf-hardattn demo",
        "recipe": asdict(recipe),
        "models": rows,
        "certificate": report.to_dict(),
        "reload": _reload(output / "hard", recipe, rows["hard"]["accuracy"]),
        "found": _found(models["hard"], test),
        "measured": {
            "device": "cpu",
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "batch": 64,
            "dtype": "float32",
            "rounds": len(seconds["soft"]),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": time.perf_counter() - began,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _draw(models["hard"], test, rows, output / "kept_patches.png")
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


def _trunk(recipe: Recipe) -> Any:
    torch.manual_seed(recipe.seed)
    config = AutoConfig.for_model(
        "vit",
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=64,
        patch_size=PATCH,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
    )
    model: nn.Module = AutoModelForImageClassification.from_config(config)
    ramp = max(1, recipe.ramp)
    _train(
        model,
        recipe,
        recipe.trunk_steps,
        "trunk",
        decay=False,
        clutter=lambda step: min(recipe.clutter, recipe.clutter * step // ramp),
    )
    return model


def _train(model: nn.Module, recipe: Recipe, steps: int, name: str, *, decay: bool, clutter: Any) -> None:
    """A plain PyTorch loop: the library asks for ``set_step`` only, since the budget has a schedule."""
    draw = torch.Generator().manual_seed(recipe.seed + (1000 if decay else 0))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    warmup = 20 if decay else 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps if decay else 1.0)
    )
    model.train()
    bar = tqdm(range(steps), desc=f"{name:>6}", unit="step", leave=True, mininterval=1.0)
    for step in bar:
        set_step(model, step)
        batch = sample_batch("train", recipe.batch, clutter(step), draw)
        loss = model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")


@torch.no_grad()
def accuracy(model: nn.Module, test: dict[str, Tensor]) -> float:
    """Share of the test images classified right, in evaluation mode."""
    model.eval()
    right = sum(
        (model(pixel_values=pixels).logits.argmax(-1) == labels).sum().item()
        for pixels, labels in zip(test["pixel_values"].split(250), test["labels"].split(250), strict=True)
    )
    return right / len(test["labels"])


def _measure(models: dict[str, nn.Module], test: dict[str, Tensor]) -> dict[str, list[float]]:
    batch = test["pixel_values"][:64]

    def call(model: nn.Module) -> Any:
        with torch.inference_mode():
            return model(pixel_values=batch)

    return interleaved_seconds({name: partial(call, model) for name, model in models.items()}, rounds=31)


@torch.no_grad()
def _found(model: nn.Module, test: dict[str, Tensor]) -> float:
    """Share of the digits' own patches that the model kept."""
    rows = torch.arange(8)
    found = []
    for pixels, box in zip(test["pixel_values"].split(250), test["box"].split(250), strict=True):
        with record(model) as selections:
            model(pixel_values=pixels)
        kept = selections[SITE][0].mask[:, 0, 0, 1:].view(-1, 8, 8)
        tall = (rows >= box[:, :1]) & (rows < box[:, 2:3])
        wide = (rows >= box[:, 1:2]) & (rows < box[:, 3:])
        inside = tall[:, :, None] & wide[:, None, :]
        found.append((kept & inside).sum() / inside.sum())
    return float(torch.stack(found).mean())


def _reload(folder: Path, recipe: Recipe, expected: float) -> dict[str, Any]:
    """Load the saved hard model in a fresh process, from its config alone, and test it again."""
    code = "import sys; from hf_hardattn.training.demo import check; check(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    arguments = [sys.executable, "-c", code, str(folder), str(recipe.test_images), str(recipe.clutter)]
    answer = json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return {**answer, "same_accuracy": answer["accuracy"] == expected}


def check(folder: str, images: int, clutter: int) -> None:
    """What the fresh process runs; prints JSON."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    test = ClutteredDigits("test", images, clutter, seed=1234).columns
    score = accuracy(model, test)
    with record(model) as selections, torch.no_grad():
        model(pixel_values=test["pixel_values"][:8])
    kept = selections[SITE][0].slots - 1  # CLS is there always and is no choice
    print(json.dumps({"accuracy": score, "patches_kept": kept, "hard": model.config.hard_attention is not None}))


@torch.no_grad()
def _draw(model: nn.Module, test: dict[str, Tensor], rows: dict[str, Any], path: Path) -> None:
    pixels, labels = test["pixel_values"][:18], test["labels"][:18]
    with record(model) as selections:
        predicted = model(pixel_values=pixels).logits.argmax(-1)
    titles = [f"{p}" if p == y else f"{p} (is {y})" for p, y in zip(predicted.tolist(), labels.tolist(), strict=True)]
    caption = f"The model computed on the lit patches only ({rows['hard']['kept']:.0%}); above each image, what it read there."
    patch_overlay(pixels, selections[SITE][0], PATCH, titles, columns=6, caption=caption).savefig(path, dpi=150)
