"""Schedules: optimizer step to value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import HardAttentionError, unknown

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
    "exponential": lambda x: x,  # linear in the logarithm, see __call__
}


@dataclass(frozen=True)
class Schedule:
    """A value over optimizer steps: ``start`` for ``delay`` steps, then to ``end`` within ``steps``, then ``end``.

    A number is the constant schedule; a dict is ``{"shape": "linear", "start": 1.0, "end": 0.1, "steps": 500, "delay": 0}``.
    """

    start: float
    end: float
    steps: int = 1
    delay: int = 0
    shape: str = "linear"

    @classmethod
    def parse(cls, value: Any, where: str) -> Schedule:
        """Read a number or a dict; ``where`` names the place in an error."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls(value, value)
        if not isinstance(value, dict) or not {"start", "end", "steps"} <= value.keys():
            raise HardAttentionError(
                f"{value!r} is not a schedule at '{where}'; use a number or a dict with start, end, steps (and delay, shape)."
            )
        extra = value.keys() - cls.__dataclass_fields__.keys()
        if extra:
            raise unknown("schedule key", sorted(extra)[0], cls.__dataclass_fields__, where)
        schedule = cls(**value)
        if schedule.shape not in SHAPES:
            raise unknown("schedule shape", schedule.shape, SHAPES, where)
        if schedule.steps < 1 or schedule.delay < 0:
            raise HardAttentionError(
                f"steps={schedule.steps}, delay={schedule.delay} at '{where}'; steps >= 1 and delay >= 0."
            )
        if schedule.shape == "exponential" and min(schedule.start, schedule.end) <= 0:
            raise HardAttentionError(
                f"an exponential schedule needs start > 0 and end > 0 at '{where}'; got {value!r}."
            )
        return schedule

    @property
    def constant(self) -> bool:
        return self.start == self.end

    def __call__(self, step: int) -> float:
        """Value at an optimizer step, counted from 0."""
        x = min(max((step - self.delay) / self.steps, 0.0), 1.0)
        if self.constant or x == 0.0:
            return self.start
        if x == 1.0:
            return self.end
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** x
        return self.start + (self.end - self.start) * SHAPES[self.shape](x)
