"""Measured cost: seconds on this machine, as medians of interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from ..devices import wait_for_device
from ..errors import HardAttentionError


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3, seconds: float | None = None
) -> dict[str, list[float]]:
    """Time each call once per round, in turn, so that a drift of the machine's speed affects all calls equally.

    Args:
        calls: maps a name to a call without arguments.
        rounds: timed rounds. warmup: rounds before them, which are not timed.
        seconds: stop after the round in which the timed rounds reach this total, but not before two of them.

    Returns:
        The seconds of each round by name.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            wait_for_device()
            if round_ >= warmup:
                found[name].append(time.perf_counter() - start)
        if seconds is not None and round_ >= warmup + 1 and sum(map(sum, found.values())) > seconds:
            break
    return found


def speedups(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Median over rounds of the time of ``baseline`` divided by each call's time in the same round; > 1 is faster than ``baseline``."""
    return {name: statistics.median(each) for name, each in ratios(seconds, baseline).items()}


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, list[float]]:
    """Return the time of ``baseline`` divided by each call's time, round by round.

    Raises:
        HardAttentionError: ``baseline`` was not timed in the same rounds; a ratio to another run would be meaningless.
    """
    rounds = {name: len(times) for name, times in seconds.items()}
    if baseline not in seconds or len(set(rounds.values())) != 1 or not rounds[baseline]:
        raise HardAttentionError(
            f"a speed-up needs its baseline: {baseline!r} was not timed in the same rounds as {', '.join(map(repr, seconds))}. "
            "Time them together, in one run."
        )
    return {name: [b / t for b, t in zip(seconds[baseline], times, strict=True)] for name, times in seconds.items()}
