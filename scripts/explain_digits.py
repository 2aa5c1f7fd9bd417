"""Explain the demo's hard model, and measure explanations against planted rationales: the digit's own patches.

    hf-hardattn demo && python scripts/explain_digits.py

Writes ``digits.html`` (the page), ``digits_faithfulness.json`` and ``digits_faithfulness.png`` to results/reports.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_hardattn.interpret import attribution
from hf_hardattn.interpret.curves import faithfulness_curves
from hf_hardattn.interpret.faithfulness import compare, own_sufficiency
from hf_hardattn.interpret.probe import Probe
from hf_hardattn.interpret.report import explain
from hf_hardattn.interpret.subject import Subject
from hf_hardattn.training.cluttered_digits import ClutteredDigits

EXPLANATIONS = ("oracle", "selection", "soft attention", "integrated gradients", "random")


def planted(box: torch.Tensor, grid: int = 8) -> torch.Tensor:
    """The digit's own patches, bool ``[B, 1 + grid * grid]`` with CLS first, from its box in patches."""
    rows = torch.arange(grid)
    tall = (rows >= box[:, :1]) & (rows < box[:, 2:3])
    wide = (rows >= box[:, 1:2]) & (rows < box[:, 3:])
    inside = (tall[:, :, None] & wide[:, None, :]).flatten(1)
    return torch.nn.functional.pad(inside, (1, 0))


def measure(subject: Subject, test: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, Any]:
    """Every explanation of the hard model's own answers to ``rows``, places left out of the computation."""
    probe = Probe(subject.model, {"pixel_values": test["pixel_values"][rows]})
    human = planted(test["box"][rows])
    scores = {name: make(probe) for name, make in attribution.EXPLANATIONS.items()}
    scores["oracle"] = human + 0.5 * attribution.random(probe, seed=1)
    left_out = attribution.leave_one_out(probe)
    found = compare(probe, {name: scores[name] for name in EXPLANATIONS}, human=human, leave_one_out=left_out)
    own = float(own_sufficiency(probe).abs().max())
    return {"images": len(rows), "removal": probe.removal, "own_sufficiency": own, "explanations": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo/hard", help="Checkpoint of the demo.")
    parser.add_argument("--output_dir", type=Path, default=Path("results/reports"))
    parser.add_argument("--images", type=int, default=200, help="Test images of the measurement.")
    parser.add_argument("--shown", type=int, default=6, help="Test images on the page.")
    parser.add_argument("--seed", type=int, default=4321, help="Of the test images; not those the demo tests on.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    subject = Subject.load(args.model)
    subject.model.config.id2label = {digit: str(digit) for digit in range(10)}
    shown = ClutteredDigits("test", args.shown, 12, seed=args.seed).columns["pixel_values"]
    images = [Image.fromarray(((pixels[0] + 1) * 127.5).round().byte().numpy()) for pixels in shown]
    page = explain(subject, images, title="Cluttered digits: what the demo's hard model kept")
    (args.output_dir / "digits.html").write_text(page, encoding="utf-8")
    test = ClutteredDigits("test", args.images, 12, seed=args.seed).columns
    answers = Probe(subject.model, {"pixel_values": test["pixel_values"]}).answer
    # where the answer is wrong, the digit's patches are no rationale of it: the oracle is one on right answers only
    groups = {"right answers": (answers == test["labels"]).nonzero()[:, 0], "all answers": torch.arange(args.images)}
    results = {name: measure(subject, test, rows) for name, rows in groups.items()}
    figure = faithfulness_curves(results["right answers"]["explanations"])
    figure.savefig(args.output_dir / "digits_faithfulness.png", dpi=110)
    written = {"command": "python scripts/explain_digits.py", "seed": args.seed, **results}
    (args.output_dir / "digits_faithfulness.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    for group, result in results.items():
        print(
            f"{group}: {result['images']} images; p(answer) on exactly what it kept differs by {result['own_sufficiency']:g}"
        )
        for name, row in result["explanations"].items():
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "curves")
            print(f"  {name:<22}{numbers}")


if __name__ == "__main__":
    main()
