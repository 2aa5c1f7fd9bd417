"""Cost of importing the library for a stock model: two processes, with and without the import, timed in alternation."""

from __future__ import annotations

import statistics
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

# Runs one forward of a stock model for each line read; the parent process alternates between two such processes.
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


def cost_of_import(threads: int, rounds: int, warmup: int = 3) -> dict[str, Any]:
    """Time a stock ViT in two processes, with and without the library imported, with one forward of each in turn."""
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
            for mode in sorted(probes, reverse=bool(round_ % 2)):  # the order alternates
                stdin, stdout = probes[mode].stdin, probes[mode].stdout
                if stdin is None or stdout is None:
                    raise OSError("the probe's pipes are closed")
                print(file=stdin, flush=True)
                took, output = stdout.readline().split()
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
