"""Benchmark of exported models: every hard row in onnxruntime, with the exported stock model and the same rows in PyTorch."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .bench import EXACT, STOCK, flops, models_of, quartiles, spread, work_of
from .export import export_onnx, onnx_call
from .suites import Group
from .timing import interleaved_seconds, ratios

TORCH = "PyTorch, "  # prefix of the same models' calls in PyTorch, timed in the same rounds


def run(groups: list[Group], *, rounds: int, seconds: float | None, threads: int) -> Iterator[dict[str, Any]]:
    """Measure groups one after the other; see ``measure``."""
    for group in tqdm(groups, "export"):
        yield measure(group, rounds=rounds, seconds=seconds, threads=threads)


def measure(group: Group, *, rounds: int, seconds: float | None, threads: int) -> dict[str, Any]:
    """Export stock, exact and every row of a workload to ONNX, and time them in onnxruntime and in PyTorch, interleaved.

    Args:
        rounds: maximum number of rounds. seconds: timing budget, after which no further round starts.
        threads: threads of onnxruntime; PyTorch has its own setting.

    Returns:
        JSON: for every row its seconds, its speed-ups over stock and exact in onnxruntime and over stock in PyTorch, the counted
        FLOPs, the size of the file in bytes, and the largest difference of its first output from that of PyTorch.
    """
    workload = group.workload
    models: dict[str, Any] = models_of(group)
    inputs = workload.inputs(models[STOCK])
    calls: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, model) in enumerate(models.items()):
            path = export_onnx(model, inputs, Path(folder) / f"{number}.onnx")
            calls[name] = onnx_call(path, inputs, threads)
            found, expected = torch.from_numpy(calls[name]()[0]), workload.call(model, inputs)[0]
            entries[name] = {
                "largest_difference": float((found - expected).abs().max()),
                "flops": flops(work_of(workload, model, inputs)),
                "file_bytes": sum(file.stat().st_size for file in Path(folder).glob(f"{number}.onnx*")),
            }
        both = {**calls, **{TORCH + name: partial(workload.call, model, inputs) for name, model in models.items()}}
        timed = interleaved_seconds(both, rounds=rounds, warmup=1, seconds=seconds)
    to_stock, to_exact, in_torch = ratios(timed, STOCK), ratios(timed, EXACT), ratios(timed, TORCH + STOCK)
    for name, entry in entries.items():
        entry["seconds"] = {"median": statistics.median(timed[name]), "quartiles": quartiles(timed[name])}
        entry["seconds"]["rounds"] = len(timed[name])
        entry["against_stock"], entry["against_exact"] = spread(to_stock[name]), spread(to_exact[name])
        entry["pytorch_seconds"] = statistics.median(timed[TORCH + name])
        entry["pytorch_against_stock"] = spread(in_torch[TORCH + name])
    return {
        "name": group.name,
        "workload": vars(workload),
        "rows": entries,
        "hard": {row.name: row.hard for row in group.rows},
        "onnxruntime": version("onnxruntime"),
        "measured_at": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }
