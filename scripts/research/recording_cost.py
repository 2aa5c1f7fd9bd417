"""Measure the cost of ``record``: forward passes of the same hard model with and without it, in turn.

    python scripts/research/recording_cost.py

The times are processor seconds of this process on one thread, which do not include other work of the machine.

Writes results/recording_cost.json. The models have real sizes and random weights: the cost of a recording does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

import hf_hardattn

T5_BASE: dict[str, Any] = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "decoder_start_token_id": 0,
}


def cases() -> Iterator[tuple[str, Any, Callable[[Any], object], int]]:
    """Yield name, model, call and rounds of each case."""
    vit = ViTForImageClassification(ViTConfig()).eval()
    pixels = torch.randn(1, 3, 224, 224)
    for sites in (["vision.inputs"], ["vision.self.*"]):
        name = f"ViT-B/16 224 px, forward, {', '.join(sites)}"
        yield name, hf_hardattn.apply(vit, {"sites": sites, "budget": 0.5}), lambda m: m(pixel_values=pixels), 15
    t5 = T5ForConditionalGeneration(T5Config(**T5_BASE)).eval()
    ids = torch.randint(2, 30_000, (1, 256))
    hf_hardattn.apply(t5, {"sites": ["encoder.tokens.0", "decoder.cross.*"], "budget": 0.5})
    labels = torch.randint(2, 30_000, (1, 16))
    yield (
        "T5-base 256 -> 16 tokens, forward, encoder.tokens.0, decoder.cross.*",
        t5,
        lambda m: m(input_ids=ids, labels=labels),
        7,
    )
    hf_hardattn.apply(t5, {"sites": ["decoder.cross.*"], "budget": 0.25, "scorer": "query_key"})
    yield (
        "T5-base 256 -> 8 tokens, generate with 2 beams, decoder.cross.* per query",
        t5,
        lambda m: m.generate(ids, max_new_tokens=8, min_new_tokens=8, num_beams=2, do_sample=False),
        5,
    )


def processor_seconds(calls: dict[str, Callable[[], None]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Time each call once per round, in turn, after ``warmup`` rounds that are not recorded."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if round_ >= warmup:
                seconds[name].append(time.process_time() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/recording_cost.json"))
    parser.add_argument("--quick", action="store_true", help="Run two rounds only, to check that everything works.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, model, call, rounds in cases():

        def plain(model: Any = model, call: Any = call) -> None:
            with torch.inference_mode():
                call(model)

        def recorded(model: Any = model, call: Any = call) -> None:
            with torch.inference_mode(), hf_hardattn.record(model):
                call(model)

        # a second call without a recording shows the error of the measurement
        calls = {"plain": plain, "recorded": recorded, "plain again": plain}
        seconds = processor_seconds(calls, 2 if args.quick else rounds)
        ratios = {
            name: statistics.median(own / base for own, base in zip(times, seconds["plain"], strict=True))
            for name, times in seconds.items()
        }
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        row = {
            "case": name,
            "selections": _count(model, call),
            "rounds": len(seconds["plain"]),
            "seconds": medians,
            "cost": ratios["recorded"] - 1,
            "cost_of_nothing": ratios["plain again"] - 1,
        }
        rows.append(row)
        print(
            f"{row['cost']:+.2%} (the same twice: {row['cost_of_nothing']:+.2%})  {row['selections']} selections  {name}",
            flush=True,
        )
    results = {
        "command": "python scripts/research/recording_cost.py",
        "cost": "median over rounds of the processor time with a recording by that without in the same round, minus 1",
        "rows": rows,
        "measured": {"device": "cpu", "processor": platform.machine(), "threads": 1, "dtype": "float32"},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def _count(model: Any, call: Callable[[Any], object]) -> int:
    with hf_hardattn.record(model) as selections:
        call(model)
    return len(selections)


if __name__ == "__main__":
    main()
