"""The device of comparisons and benchmarks; training scripts leave the device to Accelerate."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def default_device() -> torch.device:
    """Return the GPU if PyTorch sees one, otherwise the CPU. As usual, ``CUDA_VISIBLE_DEVICES=`` hides the GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Return the name of the default device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Capture ``call`` as a CUDA graph; the returned function replays it without the host, on the tensors that it read at capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # one-time initialisation must not be captured
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
    """Wait until the GPU has finished its work; return at once if there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
