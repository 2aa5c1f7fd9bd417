"""Measured cost: seconds on this machine, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3
) -> dict[str, list[float]]:
    """Time each call once a round, in turn, so that a drift of the machine's speed hits all alike.

    Args:
        calls: name to a call without arguments.
        rounds: timed rounds. warmup: rounds before, not timed.

    Returns:
        name to seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def speedups(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Median over rounds of the baseline's time by each call's time in the same round; > 1 is faster than the baseline."""
    return {
        name: statistics.median(b / t for b, t in zip(seconds[baseline], times, strict=True))
        for name, times in seconds.items()
    }
