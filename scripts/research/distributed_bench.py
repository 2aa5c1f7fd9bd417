"""Training throughput of two processes compared with one, and the share of communication in a step.

    python scripts/research/distributed_bench.py --output results/distributed.json

Two gloo CPU processes with one thread each represent two devices. In every round, three kinds of step are timed one after the other:
process 0 alone, both processes with averaged gradients (DDP), and both without averaging (``no_sync``), which is the same work at the same
time without communication. The results are medians over the rounds; the slower process determines the time of a step. The batch per process
is constant, so two processes do twice the work.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import ViTConfig, ViTForImageClassification

import hf_hardattn
from hf_hardattn.training.results import describe_run, write_json

MODELS = {
    "soft": None,
    "hard, simple (masked)": {"sites": ["vision.tokens.2"], "budget": 0.5, "estimator": "simple"},
    "hard, reinforce (gathered)": {"sites": ["vision.tokens.2"], "budget": 0.5, "estimator": "reinforce"},
}


def build(hard: dict[str, Any] | None) -> ViTForImageClassification:
    """Build a ViT-S with 6 layers for images of 112 pixels."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, num_labels=100)
    model = ViTForImageClassification(ViTConfig(image_size=112, patch_size=16, **sizes)).train()
    return model if hard is None else hf_hardattn.apply(model, hard)


def timed(accelerator: Accelerator, step: Callable[[], None] | None) -> float:
    """Return the seconds until all processes have done ``step``; with None this process only waits for the others."""
    accelerator.wait_for_everyone()
    began = time.perf_counter()
    if step is not None:
        step()
    accelerator.wait_for_everyone()
    return time.perf_counter() - began


def measure(
    accelerator: Accelerator, hard: dict[str, Any] | None, batch_size: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each kind of step, by round."""
    alone = build(hard)
    both = accelerator.prepare_model(build(hard))
    images, labels = torch.randn(batch_size, 3, 112, 112), torch.arange(batch_size) % 100
    optimizers = {id(model): torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (alone, both)}

    def step(model: torch.nn.Module, synchronised: bool = True) -> None:
        with nullcontext() if synchronised else accelerator.no_sync(model):
            model(pixel_values=images, labels=labels).loss.backward()
        optimizers[id(model)].step()
        optimizers[id(model)].zero_grad()

    baselines = [s.baseline for s in hf_hardattn.selectors(alone).values() if s.baseline is not None]
    for baseline in baselines:  # its average is over all ranks, but only this one takes part
        baseline.deferred = True
    kinds = {
        "one": (lambda: step(alone)) if accelerator.is_main_process else None,
        "two": lambda: step(both),
        "two without communication": lambda: step(both, synchronised=False),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 2):
        for kind, do in kinds.items():
            taken = timed(accelerator, do)
            if turn >= 2:
                seconds[kind].append(taken)
    return seconds


def process(rank: int, port: int, args: argparse.Namespace, output: Path) -> None:
    """Run one of the two processes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    found = {}
    for name, hard in MODELS.items():
        seconds = measure(accelerator, hard, args.batch_size, args.rounds)
        one, two, silent = (statistics.median(seconds[kind]) for kind in seconds)
        found[name] = {
            "images_per_second_one_process": args.batch_size / one,
            "images_per_second_two_processes": 2 * args.batch_size / two,
            "two_against_one": 2 * one / two,
            "share_lost_to_communication": 1 - silent / two,
            "share_lost_to_sharing_the_machine": 1 - one / silent,
            "seconds": seconds,
        }
    if accelerator.is_main_process:
        write_json(output, found)
    accelerator.end_training()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="batch size of each process")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds; two more warm up")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    process(rank, port, args, Path(folder) / "found.json")
                    code = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    os._exit(code)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit("error: a process failed")
        found = json.loads((Path(folder) / "found.json").read_text())
    config = {"batch_size_of_a_process": args.batch_size, "rounds": args.rounds, "dtype": "float32"}
    config |= {"model": "ViT-S, 6 layers, 112 pixels", "threads_of_a_process": 1, "backend": "gloo"}
    results = {**config, "cpu_count": os.cpu_count(), "models": found, **describe_run(argv)}
    if args.output:
        write_json(args.output, results)
    for name, row in found.items():
        print(
            f"{name:28} {row['images_per_second_one_process']:6.1f} -> {row['images_per_second_two_processes']:6.1f} images/s, "
            f"x{row['two_against_one']:.2f}; lost to communication {row['share_lost_to_communication']:.1%}, to sharing the machine "
            f"{row['share_lost_to_sharing_the_machine']:.1%}"
        )
    return results


if __name__ == "__main__":
    main()
