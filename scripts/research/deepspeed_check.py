"""Train a hard ViT under DeepSpeed's ZeRO-2 and ZeRO-3, sharded over two CPU processes, and compare it with one plain process.

    pip install deepspeed hjson msgpack einops ninja
    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 scripts/research/deepspeed_check.py --output results/deepspeed.json

Both take the same steps on the same examples, so the losses must agree. (Accelerate starts DeepSpeed only on GPUs, so this script creates
the engine itself, with the stages and the clipping of scripts/accelerate/zero2.yaml and zero3.yaml. The first start compiles a CPU
operator, which takes some minutes.)
"""

from __future__ import annotations

import argparse
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch import Tensor, distributed, nn
from transformers import ViTConfig, ViTForImageClassification

import hf_hardattn
from hf_hardattn.training.results import describe_run, write_json

ACCELERATE = Path(__file__).resolve().parents[1] / "accelerate"
STEPS, BATCH = 6, 8
HARD: dict[str, Any] = {"sites": ["vision.inputs", "vision.tokens.0"], "budget": 0.5, "estimator": "simple"}
HARD["estimator_options"] = {"sample": False}


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a tiny hard model, always with the same weights, and its optimizer."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37, num_labels=3)
    model = ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, **sizes)).train()
    hf_hardattn.apply(model, HARD)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 3, 12, 12, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def plain(clip: float) -> list[float]:
    """Return the losses of one process that reads whole batches."""
    model, optimizer = build()
    losses = []
    for images, labels in batches():
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def sharded(stage: int, clip: float) -> list[float]:
    """Return the mean losses of the processes, each of which reads its share of every batch."""
    import deepspeed

    size, rank = distributed.get_world_size(), distributed.get_rank()
    model, optimizer = build()
    zero = {"stage": stage, "reduce_scatter": False, "overlap_comm": False}  # gloo supports neither
    config = {"train_micro_batch_size_per_gpu": BATCH // size, "gradient_clipping": clip, "zero_optimization": zero}
    config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    losses = []
    for images, labels in batches():
        mine = slice(rank, None, size)
        loss = engine(pixel_values=images[mine], labels=labels[mine]).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        losses.append(total.item() / size)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    sections = {
        stage: load_config_from_file(str(ACCELERATE / f"zero{stage}.yaml")).deepspeed_config for stage in (2, 3)
    }
    expected = plain(sections[2]["gradient_clipping"])
    found = {f"zero{stage}": sharded(stage, section["gradient_clipping"]) for stage, section in sections.items()}
    worst = {name: max(abs(a - b) for a, b in zip(losses, expected, strict=True)) for name, losses in found.items()}
    if distributed.get_rank() == 0:
        results = {"processes": distributed.get_world_size(), "backend": "gloo", "hard_attention": HARD}
        results |= {"losses": {"one process": expected, **found}, "largest_difference": worst}
        results |= {"deepspeed": metadata.version("deepspeed"), **describe_run(None)}
        results["command"] = f"torchrun --nproc_per_node {os.environ['WORLD_SIZE']} scripts/research/deepspeed_check.py"
        if args.output:
            write_json(args.output, results)
        print(worst)
    if max(worst.values()) > 1e-5:
        raise SystemExit(f"losses differ by {worst}; they must agree to 1e-5")


if __name__ == "__main__":
    main()
