"""Needles: large images and long documents at a fixed number of kept positions, compared with the model with full attention.

    hf-hardattn compare --config scripts/configs/compare/needle.yaml --seeds 3 --save
    hf-hardattn compare --config scripts/configs/compare/long_text.yaml --seeds 3 --save
    python scripts/research/needle.py accuracy --seeds 3      # the models trained above, at sizes not seen in training; --kind, --size, --variant for a part
    python scripts/research/needle.py cost                    # time, counted FLOPs and memory of wider models with random weights; --model for one
    python scripts/research/needle.py draw

Writes results/needle.json and results/needle.png.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_hardattn
from hf_hardattn.devices import default_device
from hf_hardattn.efficiency.bench import machine
from hf_hardattn.efficiency.counting import work
from hf_hardattn.efficiency.memory import peak_resident_bytes
from hf_hardattn.efficiency.timing import interleaved_seconds
from hf_hardattn.training import tasks
from hf_hardattn.training.results import read_json, write_json

RESULTS = Path("results/needle.json")
LIMIT = 8 * 2**30  # most bytes that a model may allocate
# kind: comparison that trained it, its hard variant, positions to keep, and size to (test examples, whether the soft model runs too)
TESTS: dict[str, tuple[str, str, tuple[int, ...], dict[int, tuple[int, bool]]]] = {
    "image": (
        "needle",
        "scout",
        (8, 64, 256),
        {256: (500, True), 512: (500, True), 1024: (300, True), 2048: (200, True), 4096: (60, True)},
    ),
    "text": (
        "long_text",
        "narrowing",
        (16,),
        {
            1024: (300, True),
            2048: (300, True),
            4096: (100, True),
            8192: (100, False),
            16384: (100, False),
            32768: (100, False),
        },
    ),
}
SCOUT = {"sites": ["vision.inputs"], "scorer": "scout", "budget": 256}
MLP = {"sites": ["encoder.inputs"], "scorer": "mlp", "budget": 256}
WIDE: dict[str, Any] = dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=2)
# model: its hard configuration, and sizes with whether to try stock
COSTS: dict[str, tuple[dict[str, Any], dict[int, bool]]] = {
    "ViT": (SCOUT, {512: True, 1024: True, 2048: True, 4096: False}),
    "BLIP vision": (SCOUT, {512: True, 1024: True, 2048: True, 4096: False}),
    "T5 encoder": (MLP, {1024: True, 2048: True, 4096: True, 8192: True, 16384: True, 32768: False}),
}


def accuracy(
    kinds: list[str], only: int | None, variant: str | None, seeds: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Test the trained models at every size or at one, for all variants or for one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in kinds:
        comparison, hard, budgets, sizes = TESTS[kind]
        found[kind] = []
        for seed in range(seeds):
            for name in ("soft", "random", hard):
                role = "hard" if name == hard else name
                if variant not in (None, role):
                    continue
                model = load(kind, folder / comparison / "models" / f"{name}-{seed}")
                for keep in budgets if name == hard else budgets[:1]:
                    for selector in hf_hardattn.selectors(model).values():
                        selector.config = hf_hardattn.SiteConfig(**{**vars(selector.config), "budget": keep})
                        selector.budget_schedule = None
                    for size, (count, whole) in sizes.items():
                        if only not in (None, size):
                            continue
                        if name != hard and not whole:  # random selection is no better in larger inputs
                            continue
                        row = {"model": role, "keep": keep, "seed": seed, "size": size, "examples": count}
                        found[kind].append(row | right(kind, model, size, count))
                        print(found[kind][-1], flush=True)
    return found


def load(kind: str, place: Path) -> PreTrainedModel:
    cls = ViTForImageClassification if kind == "image" else T5ForConditionalGeneration
    return cls.from_pretrained(place).eval().to(default_device())


@torch.no_grad()
def right(kind: str, model: PreTrainedModel, size: int, count: int) -> dict[str, float]:
    """Share of correct answers (for a text, all of its needles), and share of examples whose needle was kept."""
    answered = kept = 0
    for batch in examples(kind, size, count):
        batch = batch.to(model.device)
        with hf_hardattn.record(model) if hf_hardattn.selectors(model) else torch.no_grad() as selections:
            answer = model(**batch.inputs).logits.argmax(-1)
        labels = batch.inputs["labels"]
        answered += int((answer == labels).view(len(labels), -1).all(-1).sum())
        if selections:
            held = selections[0].mask[:, 0] & batch.gold
            kept += int((held.sum(-1) == batch.gold.sum(-1)).sum())
    return {"exact": answered / count, "needle_kept": kept / count if hf_hardattn.selectors(model) else 1.0}


def examples(kind: str, size: int, count: int) -> Iterator[tasks.Batch]:
    if kind == "image":
        yield from tasks.load("needle", {"canvas": size, "test_images": count}).test()
        return
    task: Any = tasks.load("planted_rationale", {"length": size})
    generator, most = torch.Generator().manual_seed(tasks.TEST_SEED), max(1, 2**16 // size)
    for start in range(0, count, most):
        yield task.rows(min(most, count - start), generator)


def build(name: str) -> nn.Module:
    """Build a model with the width of ViT-S, two layers and random weights."""
    torch.manual_seed(0)
    if name == "ViT":
        return ViTForImageClassification(ViTConfig(image_size=224, patch_size=16, **WIDE)).eval()
    if name == "BLIP vision":
        return BlipVisionModel(BlipVisionConfig(image_size=224, patch_size=16, initializer_range=0.02, **WIDE)).eval()
    return T5EncoderModel(T5Config(d_model=384, d_ff=1536, num_heads=6, num_layers=2)).eval()


def inputs(name: str, size: int) -> dict[str, Any]:
    torch.manual_seed(1)
    if name == "T5 encoder":
        return {"input_ids": torch.randint(2, 32000, (1, size))}
    return {"pixel_values": torch.randn(1, 3, size, size), "interpolate_pos_encoding": True}


def cost(name: str, size: int, stock: bool, rounds: int, threads: int) -> dict[str, Any]:
    """Measure one model at one size, in a process that may allocate ``LIMIT`` bytes."""
    torch.set_num_threads(threads)
    batch, models = (
        inputs(name, size),
        {"stock": build(name), "hard": hf_hardattn.apply(build(name), COSTS[name][0]).eval()},
    )
    flops = {key: _flops(model, batch) for key, model in models.items()}
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    row: dict[str, Any] = {"model": name, "size": size, "flops": flops, "seconds": {}, "peak_bytes": {}}
    if not stock:
        del models["stock"]
    calls = {key: partial(_call, model, batch) for key, model in models.items()}
    for key in list(calls):
        try:
            row["peak_bytes"][key] = peak_resident_bytes(calls[key])
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            row["does_not_fit"] = key
            del calls[key]
    timed = interleaved_seconds(calls, rounds=rounds, warmup=0, seconds=25.0)
    row["seconds"] = {key: statistics.median(each) for key, each in timed.items()}
    return row


def costs(models: list[str], rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Yield ``cost`` of every size of some models, each measured in its own process."""
    for model in models:
        for size in COSTS[model][1]:
            command = [sys.executable, __file__, "one", "--model", model, "--size", str(size)]
            command += ["--rounds", str(rounds), "--threads", str(threads)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            yield json.loads(output.splitlines()[-1])


def _call(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    with torch.inference_mode():
        return model(**batch)


def _flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    return sum(value for part, value in work(partial(model, **batch)).items() if part != "other")


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot accuracy, time, FLOPs and memory against size."""
    from matplotlib.figure import Figure

    kinds = ("image", "text")
    figure = Figure(figsize=(13, 3.2 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), 4, squeeze=False)
    for line, kind in zip(axes, kinds, strict=True):
        rows, unit = results["accuracy"].get(kind, []), "pixels a side" if kind == "image" else "tokens"
        colours = {"soft": "0.45", "random": "C1", "hard": "C0"}
        for model, keep in dict.fromkeys((row["model"], row["keep"]) for row in rows):
            held = [row for row in rows if (row["model"], row["keep"]) == (model, keep)]
            sizes = sorted({row["size"] for row in held})
            share = [100 * statistics.fmean(row["exact"] for row in held if row["size"] == size) for size in sizes]
            style = ("o-", "o--", "o:")[TESTS[kind][2].index(keep)]
            name = model if model == "soft" else f"{model}, {keep} kept"
            line[0].plot(sizes, share, style, color=colours[model], label=name, markersize=4)
        if rows:
            line[0].set_ylabel("right, %" if kind == "image" else "all needles right, %")
            line[0].set_ylim(0, 102)
            line[0].legend(fontsize=8, loc="center left")
        else:
            line[0].set_axis_off()
        measured = [row for row in results["cost"]["rows"] if (row["model"] == "T5 encoder") == (kind == "text")]
        for index, name in enumerate(dict.fromkeys(row["model"] for row in measured)):
            held = [row for row in measured if row["model"] == name]
            for key, style in (("stock", ":"), ("hard", "-")):
                for axis, what, scale in (
                    (line[1], "seconds", 1.0),
                    (line[2], "flops", 1e9),
                    (line[3], "peak_bytes", 2**20),
                ):
                    points = [(row["size"], row[what][key] / scale) for row in held if key in row[what]]
                    axis.plot(
                        *zip(*points, strict=True),
                        f"o{style}",
                        color=f"C{3 * index}",
                        label=f"{name}, {key}",
                        markersize=4,
                    )
            for row in held:
                if row.get("does_not_fit"):
                    line[3].axvline(row["size"], color=f"C{3 * index}", alpha=0.4, linewidth=1)
                    line[3].text(
                        row["size"],
                        0.97,
                        f"stock {name}: more than 8 GiB ",
                        transform=line[3].get_xaxis_transform(),
                        rotation=90,
                        fontsize=6,
                        ha="right",
                        va="top",
                    )
                    break
        for axis, what in zip(line[1:], ("seconds", "GFLOPs (counted)", "peak memory of a call, MiB"), strict=True):
            axis.set_yscale("log")
            axis.set_ylabel(what)
        line[1].legend(fontsize=7)
        for axis in line:
            every = sorted({row["size"] for row in [*rows, *measured]})
            axis.set_xscale("log", base=2)
            axis.set_xticks(every, [f"{size:,}" for size in every], fontsize=7)
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.set_xlabel(unit)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "cost", "one", "draw"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--kind", choices=tuple(TESTS))
    parser.add_argument("--model", choices=tuple(COSTS))
    parser.add_argument("--size", type=int, help="pixels per side, or tokens")
    parser.add_argument("--variant", choices=("soft", "random", "hard"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "one":
        print(json.dumps(cost(args.model, args.size, COSTS[args.model][1][args.size], args.rounds, args.threads)))
        return
    if args.what == "draw":
        draw(read_json(RESULTS), RESULTS.with_suffix(".png"))
        return
    results: dict[str, Any]
    if args.what == "accuracy":
        results = {"accuracy": read_json(RESULTS).get("accuracy", {}) if RESULTS.exists() else {}}
        for kind, rows in accuracy(
            [args.kind] if args.kind else list(TESTS), args.size, args.variant, args.seeds, args.folder
        ).items():
            others = [
                row
                for row in results["accuracy"].get(kind, [])
                if args.size not in (None, row["size"]) or args.variant not in (None, row["model"])
            ]
            results["accuracy"][kind] = others + rows
    else:
        rows = list(costs([args.model] if args.model else list(COSTS), args.rounds, args.threads))
        results = {"cost": {"machine": machine(args.threads), "limit_bytes": LIMIT, "kept": SCOUT["budget"]}}
        before = read_json(RESULTS).get("cost", {}).get("rows", []) if RESULTS.exists() and args.model else []
        results["cost"]["rows"] = [row for row in before if row["model"] != args.model] + rows
    write_json(RESULTS, {**(read_json(RESULTS) if RESULTS.exists() else {}), **results})


if __name__ == "__main__":
    main()
