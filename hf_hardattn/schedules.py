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

    Attributes:
        steps, delay: int counts optimizer steps; a float in (0, 1] is the share of all training steps.
        stages: 0 changes the value every step; n changes it n times, at equal distances.
    """

    start: float
    end: float
    steps: float = 1
    delay: float = 0
    shape: str = "linear"
    stages: int = 0

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
        for name, count, low in (
            ("steps", schedule.steps, 1),
            ("delay", schedule.delay, 0),
            ("stages", schedule.stages, 0),
        ):
            share = isinstance(count, float) and name != "stages" and 0.0 < count <= 1.0
            if isinstance(count, bool) or not (share or isinstance(count, int) and count >= low):
                raise HardAttentionError(
                    f"{name}={count!r} of a schedule at '{where}'; an int counts optimizer steps, >= {low}; steps and delay may "
                    "also be a float in (0, 1], the share of all training steps."
                )
        if schedule.shape == "exponential" and min(schedule.start, schedule.end) <= 0:
            raise HardAttentionError(
                f"an exponential schedule needs start > 0 and end > 0 at '{where}'; got {value!r}."
            )
        return schedule

    @property
    def constant(self) -> bool:
        return self.start == self.end

    @property
    def relative(self) -> bool:
        """Whether it needs to know how many steps the training has."""
        return not self.constant and (isinstance(self.steps, float) or isinstance(self.delay, float))

    def __call__(self, step: int, total: int = 0) -> float:
        """Value at an optimizer step, counted from 0; ``total`` steps of training serve what is given as a share."""
        steps, delay = (n * total if isinstance(n, float) else n for n in (self.steps, self.delay))
        x = min(max((step - delay) / max(steps, 1), 0.0), 1.0)
        if self.stages:
            x = math.floor(x * self.stages) / self.stages
        if self.constant or x == 0.0:
            return self.start
        if x == 1.0:
            return self.end
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** x
        return self.start + (self.end - self.start) * SHAPES[self.shape](x)
