"""Explain a checkpoint on the test set of its task, and compare explanations with the planted rationales if the task has them.

    hf-hardattn demo && python scripts/research/explain_checkpoint.py --name digits --model outputs/demo/hard \\
        --task cluttered_digits --task_options '{"clutter": 12, "layers": 3, "heads": 4}'

Writes ``NAME.html`` (the page, except for tasks on raw token ids), ``NAME_faithfulness.json`` and ``NAME_faithfulness.png`` to
results/reports.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_hardattn.errors import HardAttentionError
from hf_hardattn.inspection import attribution
from hf_hardattn.inspection.curves import faithfulness_curves
from hf_hardattn.inspection.faithfulness import compare, own_sufficiency
from hf_hardattn.inspection.model_with_processor import ModelWithProcessor
from hf_hardattn.inspection.perturbation import PerturbationEvaluator
from hf_hardattn.inspection.report import explain
from hf_hardattn.training import tasks

EXPLANATIONS = ("oracle", "selection", "soft attention", "integrated gradients", "random")
# A planted rationale is a set, so it is compared at its own size. The metrics over many sizes (AOPC, curves) also need an order; the oracle
# uses that of leave-one-out, inside the set and after it.
ORDERED_BY = {"sufficiency_of_size": 1, "comprehensiveness_of_size": -1, "sufficiency": 1, "comprehensiveness": -1}


def measure(evaluator: PerturbationEvaluator, gold: torch.Tensor) -> dict[str, Any]:
    """Measure every explanation of the model's own answers; positions are left out of the computation if the model supports that."""
    scores: dict[str, torch.Tensor] = {}
    for name, make in attribution.EXPLANATIONS.items():
        try:
            scores[name] = make(evaluator)
        except HardAttentionError as error:  # integrated gradients need a model that takes embeddings
            print(f"left out: {name}, {error}")
    left_out = attribution.leave_one_out(evaluator)
    scores["oracle"] = gold.float() + 0.5 * (left_out - left_out.min()) / (left_out.max() - left_out.min()).clamp(
        min=1e-9
    )
    shown = {name: scores[name] for name in EXPLANATIONS if name in scores}
    found = compare(evaluator, shown, human=gold, leave_one_out=left_out)
    order = {key: sorted(found, key=lambda name: sign * found[name][key]) for key, sign in ORDERED_BY.items()}
    own = float(own_sufficiency(evaluator).abs().max()) if evaluator.removal == "select" else None
    return {
        "rows": len(gold),
        "removal": evaluator.removal,
        "own_sufficiency": own,
        "best_first": order,
        "explanations": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="Name of the files.")
    parser.add_argument("--model", required=True, help="Hard checkpoint.")
    parser.add_argument("--task", required=True, help="Task whose test set is used.")
    parser.add_argument("--task_options", type=json.loads, default={}, help="Options of the task, as JSON.")
    parser.add_argument("--title", default="", help="Title of the page.")
    parser.add_argument("--rows", type=int, default=200, help="Test rows of the measurement.")
    parser.add_argument("--shown", type=int, default=6, help="Test images on the page.")
    parser.add_argument("--output_dir", type=Path, default=Path("results/reports"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    bundle, task = ModelWithProcessor.load(args.model), tasks.load(args.task, args.task_options)
    batch = next(task.test())
    inputs = {name: value[: args.rows] for name, value in batch.inputs.items()}
    if bundle.takes_images:
        shown = ((inputs["pixel_values"][: args.shown] + 1) * 127.5).round().byte()
        images = [Image.fromarray(pixels[0].numpy()) for pixels in shown]
        page = explain(bundle, images, title=args.title)
        (args.output_dir / f"{args.name}.html").write_text(page, encoding="utf-8")
    if batch.gold is None:
        return
    gold = batch.gold[: args.rows, 0]
    tokens = (
        inputs["labels"].shape[1] if inputs["labels"].dim() == 2 else 1
    )  # length of a generated answer: that of the correct one
    answers = PerturbationEvaluator(bundle.model, inputs, answer_tokens=tokens).answer
    right = answers == inputs["labels"] if answers.dim() == 1 else _same(answers, inputs["labels"])
    # the planted positions are not the rationale of a wrong answer, so the oracle is only valid on correct ones
    groups = {"right answers": right.nonzero()[:, 0], "all answers": torch.arange(len(gold))}
    results = {}
    for name, rows in groups.items():
        if not len(rows):
            print(f"left out: {name}, there are none among {len(gold)} rows")
            continue
        subset = {key: value[rows] for key, value in inputs.items()}
        results[name] = measure(PerturbationEvaluator(bundle.model, subset, answer_tokens=tokens), gold[rows])
    figure = faithfulness_curves(next(iter(results.values()))["explanations"])
    figure.savefig(args.output_dir / f"{args.name}_faithfulness.png", dpi=110)
    written = {"command": shlex.join(["python", *sys.argv]), **results}
    path = args.output_dir / f"{args.name}_faithfulness.json"
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    for group, result in results.items():
        print(
            f"{group}: {result['rows']} rows; p(answer) on exactly what it kept differs by {result['own_sufficiency']}"
        )
        for name, row in result["explanations"].items():
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "curves")
            print(f"  {name:<22}{numbers}")
        for key, names in result["best_first"].items():
            print(f"  {key}: {' > '.join(names)}")


def _same(answers: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return which rows of generated tokens begin with the labels."""
    wide = torch.nn.functional.pad(answers, (0, max(0, labels.shape[1] - answers.shape[1])), value=-1)
    return ((wide[:, : labels.shape[1]] == labels) | (labels == -100)).all(-1)


if __name__ == "__main__":
    main()
