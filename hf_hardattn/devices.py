"""Where a comparison or a benchmark runs; training scripts leave that to Accelerate."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def default_device() -> torch.device:
    """The GPU where PyTorch sees one, else the processor. ``CUDA_VISIBLE_DEVICES=`` hides it, as everywhere."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """What the default device calls itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as a CUDA graph: captured once, replayed without the host, on the tensors that it read when it was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # what is made once must not be captured
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def wait_for_device() -> None:
    """Return when the GPU has done what it was told; at once where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
