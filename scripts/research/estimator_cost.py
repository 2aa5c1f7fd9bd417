"""Cost of an estimator relative to a training step: SIMPLE at N = 1,024, k = 256, batch 32, and a ViT-S step on the same number of patches.

python scripts/research/estimator_cost.py            # writes results/estimator_cost.json
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_hardattn import registry
from hf_hardattn.efficiency.timing import interleaved_seconds
from hf_hardattn.estimators import Sampling
from hf_hardattn.training.results import describe_run, write_json

SIZES = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, patch_size=16)


def training_step(batch: int, patches: int) -> Any:
    """Return a training step of a stock SDPA ViT-S on ``batch`` images: forward, backward, AdamW."""
    config = ViTConfig(**SIZES, image_size=16 * int(patches**0.5), num_labels=1000, attn_implementation="sdpa")
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    pixels, labels = torch.randn(batch, 3, config.image_size, config.image_size), torch.randint(1000, (batch,))

    def step() -> None:
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def choice(name: str, options: dict[str, Any], batch: int, patches: int, k: int) -> Any:
    """Return forward and backward of an estimator on ``batch`` rows."""
    estimator: nn.Module = registry.load("estimators", name)(**options)
    scores = torch.randn(batch, 1, 1, patches, requires_grad=True)
    count, valid = torch.full((batch, 1, 1), k), torch.ones(batch, 1, 1, patches, dtype=torch.bool)
    weight = torch.randn(scores.shape)

    def run() -> None:
        selection = estimator.choose(scores, count, valid, slots=k, sampling=Sampling(uniform=torch.rand))
        (selection.gates * weight).sum().backward()
        scores.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patches", type=int, default=1024, help="number of patches, a square number")
    parser.add_argument("--keep", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--micro_batch", type=int, default=2, help="images per measured step; its time is scaled to --batch"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/estimator_cost.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cases = {
        "step": training_step(args.micro_batch, args.patches),
        "simple": choice("simple", {}, args.batch, args.patches, args.keep),
        "simple, sample=False": choice("simple", {"sample": False}, args.batch, args.patches, args.keep),
        "straight_through": choice("straight_through", {}, args.batch, args.patches, args.keep),
    }
    seconds = {
        name: statistics.median(times)
        for name, times in interleaved_seconds(cases, rounds=args.rounds, warmup=1).items()
    }
    step = seconds.pop("step") * args.batch / args.micro_batch
    results = {
        "model": "ViT-S/16, SDPA, float32",
        "patches": args.patches,
        "keep": args.keep,
        "batch": args.batch,
        "micro_batch": args.micro_batch,
        "threads": args.threads,
        "rounds": args.rounds,
        "step_seconds": step,
        "seconds": seconds,
        "share_of_step": {name: value / step for name, value in seconds.items()},
        **describe_run(None),
    }
    write_json(args.output, results)
    for name, share in results["share_of_step"].items():
        print(f"{name:<24}{seconds[name]:.3f} s   {share:.2%} of a step of {step:.0f} s")


if __name__ == "__main__":
    main()
