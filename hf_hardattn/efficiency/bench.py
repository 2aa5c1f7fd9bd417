"""Benchmark: what the library costs a soft model, and what selection saves a hard one."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import T5Config, T5EncoderModel, ViTConfig, ViTForImageClassification

from ..config import HardAttentionConfig
from ..registration import apply
from .counting import count_flops
from .timing import interleaved_seconds, speedups

# One forward of a stock model for each line read; the parent asks two such processes in turn.
IMPORT_PROBE = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
if sys.argv[1] == "with": import hf_hardattn
from transformers import ViTConfig, ViTForImageClassification
torch.manual_seed(0)
model = ViTForImageClassification(ViTConfig(num_hidden_layers=4)).eval()
pixels = torch.randn(1, 3, 224, 224)
for _ in sys.stdin:
    with torch.inference_mode():
        start = time.perf_counter(); logits = model(pixel_values=pixels).logits; seconds = time.perf_counter() - start
    print(seconds, logits.double().sum().item().hex(), flush=True)
"""


def run(*, rounds: int, threads: int, layers: int = 12) -> dict[str, Any]:
    """Measure; each speed-up is a ratio to stock SDPA in the same run, interleaved, median over rounds.

    Returns:
        ``rows`` (case, counted and measured speed-up, seconds), ``registered`` (stock model with the library imported, relative to
        without), and the machine.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = _vit(rounds, layers) + _t5(rounds, layers)
    return {
        "command": f"hf-hardattn bench --rounds {rounds} --threads {threads} --layers {layers}",
        "rows": rows,
        "registered": _registered(threads, 8 * rounds),
        "measured": {
            "device": "cpu",
            "processor": platform.processor() or platform.machine(),
            "threads": threads,
            "batch": 1,
            "dtype": "float32",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _vit(rounds: int, layers: int) -> list[dict[str, Any]]:
    config = ViTConfig(num_hidden_layers=layers)  # ViT-B/16 at 224 pixels has 12
    sites = {"vision.inputs": 0.25, "vision.tokens.0": 0.25, "vision.tokens.[258]": 0.7, "vision.self.*": 0.25}
    batch = {"pixel_values": torch.randn(1, 3, 224, 224)}
    return _compare("ViT-B/16 224 px", lambda: ViTForImageClassification(config), sites, batch, rounds)


def _t5(rounds: int, layers: int) -> list[dict[str, Any]]:
    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=layers, num_heads=12)  # T5-base has 12
    sites = {"encoder.inputs": 0.25, "encoder.tokens.0": 0.25, "encoder.self.*": 0.25}
    batch = {"input_ids": torch.randint(2, 32000, (1, 512))}
    return _compare("T5-base encoder 512 tokens", lambda: T5EncoderModel(config), sites, batch, rounds)


def _compare(
    name: str, build: Callable[[], nn.Module], sites: dict[str, float], batch: dict[str, Any], rounds: int
) -> list[dict[str, Any]]:
    models = {"stock SDPA": build().eval()}
    for site, budget in sites.items():
        hard = HardAttentionConfig(sites=[site], budget=budget, estimator="straight_through")
        models[f"{site} keep {budget}"] = apply(build(), hard).eval()

    def call(model: nn.Module) -> Any:
        with torch.inference_mode():
            return model(**batch)

    seconds = interleaved_seconds(
        {case: partial(call, model) for case, model in models.items()}, rounds=rounds, warmup=min(3, rounds)
    )
    ratios = speedups(seconds, "stock SDPA")
    stock = count_flops(models["stock SDPA"], batch)
    return [
        {
            "case": f"{name}, {case}",
            "counted": stock / count_flops(model, batch),
            "measured": ratios[case],
            "seconds": statistics.median(seconds[case]),
        }
        for case, model in models.items()
    ]


def _registered(threads: int, rounds: int, warmup: int = 3) -> dict[str, Any]:
    """A stock ViT in two processes, with and without the library imported, one forward of each in turn."""
    arguments = {mode: [sys.executable, "-c", IMPORT_PROBE, mode, str(threads)] for mode in ("with", "without")}
    seconds: dict[str, list[float]] = {mode: [] for mode in arguments}
    outputs = set()
    with ExitStack() as stack:
        probes = {
            mode: stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for mode, command in arguments.items()
        }
        for round_ in range(warmup + rounds):
            for mode in sorted(probes, reverse=bool(round_ % 2)):  # each goes first in every other round
                asked, answered = probes[mode].stdin, probes[mode].stdout
                if asked is None or answered is None:
                    raise OSError("the probe's pipes are closed")
                print(file=asked, flush=True)
                took, output = answered.readline().split()
                outputs.add(output)
                if round_ >= warmup:
                    seconds[mode].append(float(took))
        for probe in probes.values():
            probe.communicate()
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "relative_time": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4),
        "identical_outputs": len(outputs) == 1,
        "rounds": rounds,
    }
