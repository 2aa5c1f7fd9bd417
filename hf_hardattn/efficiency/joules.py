"""Measured cost: joules, from the energy counters of the machine. Without a counter, nothing is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..devices import wait_for_device

_RAPL = Path("/sys/class/powercap")


def read_joules() -> float | None:
    """Read the energy counters of the machine, in joules since an arbitrary start: the CPU packages (RAPL) and the current NVIDIA GPU
    (NVML); None if none of them can be read. An estimate from the rated power of a processor would not be a measurement."""
    found = [joules for joules in (_packages(), _gpu()) if joules is not None]
    return sum(found) if found else None


def joules_per_call(call: Callable[[], object], calls: int) -> float | None:
    """Return the mean energy of one ``call`` over ``calls`` calls; None if it cannot be measured."""
    start = read_joules()
    if start is None:
        return None
    for _ in range(calls):
        call()
    wait_for_device()
    end = read_joules()
    return None if end is None or end <= start else (end - start) / calls


def _packages() -> float | None:
    total = None
    for counter in sorted(_RAPL.glob("intel-rapl:?/energy_uj")):
        try:
            total = (total or 0.0) + int(counter.read_text()) / 1e6
        except (OSError, ValueError):
            return None
    return total


def _gpu() -> float | None:
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except (ImportError, OSError, RuntimeError):
        return None
