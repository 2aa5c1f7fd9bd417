"""Train a checkpoint for its model card: soft, hard and random from one base checkpoint, with all numbers of the card.

    python scripts/research/train_checkpoint.py --name vit-tiny-cluttered-fashion-hard \\
        --config scripts/configs/compare/cluttered_fashion.yaml --variant robust --seed 5

Models are written to outputs/checkpoints/NAME, numbers and the picture to results/checkpoints/NAME.{json,png}. The seed is not among those
of the comparison, so the checkpoint is independent of the table of seeds in its card.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_hardattn.inspection.alignment import selection_matrix
from hf_hardattn.inspection.overlay import patch_overlay
from hf_hardattn.recording import record, selectors
from hf_hardattn.training import tasks, variants
from hf_hardattn.training.comparison import Comparison
from hf_hardattn.training.tasks._texts import Texts


@torch.no_grad()
def draw(model: Any, task: tasks.Base, path: Path, images: int = 12) -> None:
    """Draw the first test images with the kept patches under the model's answers; for a text, the source tokens that each output read."""
    inputs = {name: value[:images] for name, value in next(task.test()).inputs.items()}
    if isinstance(task, Texts):
        draw_text(model, task, path)
        return
    with record(model) as selections:
        found = model(**inputs).logits.argmax(-1).tolist()
    names, labels = model.config.id2label, inputs["labels"].tolist()
    titles = [names[a] if a == b else f"{names[a]} (is {names[b]})" for a, b in zip(found, labels, strict=True)]
    selection = selections[next(iter(selectors(model)))][0]
    share = float(selection.kept_ratio.mean())
    caption = f"The model computed on the lit patches only ({share:.0%}); above each image, what it read there."
    figure = patch_overlay(
        inputs["pixel_values"], selection, model.config.patch_size, titles, columns=6, caption=caption
    )
    figure.savefig(path, dpi=130)


def draw_text(model: Any, task: Texts, path: Path) -> None:
    """Draw a test text of median length against the output of the model."""
    *_, batch = itertools.islice(task.test(), 1 + sum(1 for _ in task.test()) // 2)
    source = {name: value[:1] for name, value in batch.inputs.items() if name != "labels"}
    with record(model) as recording:
        written = model.generate(**source, do_sample=False, num_beams=1, max_new_tokens=64)[0, 1:]
    tokens = task.processor().convert_ids_to_tokens
    figure = selection_matrix(recording, tokens(source["input_ids"][0]), tokens(written))
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="Name of the checkpoint.")
    parser.add_argument("--config", type=Path, required=True, help="Comparison that defines the task and the recipe.")
    parser.add_argument("--variant", required=True, help="Variant of the comparison: how the hard model selects.")
    parser.add_argument(
        "--seed", type=int, required=True, help="Seed; it must differ from those that the comparison reports."
    )
    parser.add_argument("--threads", type=int, default=0, help="Number of PyTorch threads; 0 for PyTorch's default.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/checkpoints"), help="Folder for the models.")
    parser.add_argument(
        "--results_dir", type=Path, default=Path("results/checkpoints"), help="Folder for the numbers and the picture."
    )
    parser.add_argument("--quick", action="store_true", help="Run a few steps only, to check that everything works.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()  # fresh selectors are expected here, and files are small
    transformers.utils.logging.disable_progress_bar()
    comparison = Comparison.read(args.config).only([args.variant, "random"])
    _, recipe, fields = comparison.settle(args.quick)
    hard = {"hard": fields[args.variant], "random": fields["random"]}
    output = args.output_dir / args.name

    def on_step(name: str, step: int, steps: int, loss: float) -> None:
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"{name:>6} {step + 1:>6} of {steps}: loss {loss:.3f}", flush=True)

    found, models = variants.run(comparison.task, comparison.task_options, recipe, hard, args.seed, output, on_step)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "task": comparison.task,
        "recipe": {**asdict(recipe), "seed": args.seed},
        "hard_attention": fields[args.variant],
        **found,
    }
    args.results_dir.mkdir(parents=True, exist_ok=True)
    (args.results_dir / f"{args.name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    task = tasks.load(comparison.task, comparison.task_options)
    processor = task.processor()
    if processor is not None:
        processor.save_pretrained(output / "hard")
    draw(models["hard"], task, args.results_dir / f"{args.name}.png")
    for name, row in found["models"].items():
        print(f"{name:>6}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print("\n".join(site["statement"] for site in found["certificate"]["sites"]))


if __name__ == "__main__":
    main()
