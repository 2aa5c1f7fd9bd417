"""Schedules, which map an optimizer step to a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .amounts import MOST_COUNT, is_number, read_amount, write_amount
from .errors import HardAttentionError, shown, unknown

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x),
    "exponential": lambda x: x,  # linear in the logarithm, see __call__
}
LARGEST = 1e30  # largest value: float32 represents it and its product with a loss
LEAST_EXPONENTIAL = 1e-12  # smallest value: the ratio of two values stays finite
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Schedule:
    """A value over optimizer steps: ``start`` for ``delay`` steps, then a change to ``end`` over ``steps`` steps, then ``end``.

    A number is a constant schedule; a dict is ``{"shape": "linear", "start": 1.0, "end": 0.1, "steps": 500, "delay": 0}``.

    Attributes:
        start, end: finite numbers.
        steps, delay: an int is a number of optimizer steps; a float in (0, 1] is a share of all training steps. In JSON ``{"count": 500}``
            and ``{"ratio": 0.4}``.
        shape: ``linear``, ``cosine`` or ``exponential``.
        stages: 0 changes the value every step; n changes it n times, at equal intervals.
    """

    start: float
    end: float
    steps: float = 1
    delay: float = 0
    shape: str = "linear"
    stages: int = 0

    @classmethod
    def parse(cls, value: Any, where: str) -> Schedule:
        """Read a number or a dict, in memory or from JSON; ``where`` names the place in an error.

        Raises:
            HardAttentionError: if it is neither, a key or shape is unknown, or a number is out of range.
        """
        if is_number(value):
            _check_value("value", value, where)
            return cls(value, value)
        if not isinstance(value, Mapping) or not {"start", "end", "steps"} <= value.keys():
            raise HardAttentionError(
                f"{shown(value)} is not a schedule at {shown(where)}; use a number or a dict with start, end, steps (and delay, shape)."
            )
        known = cls.__dataclass_fields__
        for key in value:
            if key not in known:
                raise unknown("schedule key", key, known, where)
        schedule = cls(**{key: read_amount(item, key, where) for key, item in value.items()})
        schedule._check(where)
        return schedule

    def _check(self, where: str) -> None:
        _check_value("start", self.start, where)
        _check_value("end", self.end, where)
        _check_steps("steps", self.steps, 1, where)
        _check_steps("delay", self.delay, 0, where)
        _check_steps("stages", self.stages, 0, where)
        if not isinstance(self.shape, str) or self.shape not in SHAPES:
            raise unknown("schedule shape", self.shape, SHAPES, where)
        if self.shape == "exponential" and min(self.start, self.end) < LEAST_EXPONENTIAL:
            raise HardAttentionError(
                f"an exponential schedule needs start > 0 and end > 0 at {shown(where)}, {LEAST_EXPONENTIAL} at least; "
                f"got start={self.start}, end={self.end}. Use another shape to reach 0."
            )

    @property
    def constant(self) -> bool:
        return self.start == self.end

    @property
    def relative(self) -> bool:
        """Whether the values depend on the number of training steps."""
        return not self.constant and (isinstance(self.steps, float) or isinstance(self.delay, float))

    def __call__(self, step: int, total: int = 0) -> float:
        """Return the value at an optimizer step, counted from 0. ``total`` is the number of training steps, needed for shares."""
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


@dataclass(frozen=True)
class Sampled:
    """A ratio that is drawn anew at every optimizer step, log-uniformly: it is as likely to lie in [0.1, 0.2] as in [0.4, 0.8].

    The ratio is ``low (high / low) ** u``, where u is the fractional part of ``1/2 + step / golden ratio``. This sequence covers [0, 1]
    evenly from its first steps on. It needs no state, so a resumed training and all processes draw the same ratios.

    Attributes:
        low, high: 0 < low < high <= 1. Evaluation uses ``low``.
    """

    low: float
    high: float
    constant: ClassVar[bool] = False

    @classmethod
    def parse(cls, value: Any, where: str) -> Sampled:
        """Read ``{"sample": [0.1, 1.0]}``; ``where`` names the place in an error.

        Raises:
            HardAttentionError: if it is not two ratios, the lower one first.
        """
        ends = value["sample"]
        fine = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(is_number, ends))
        if len(value) != 1 or not fine or not 0 < ends[0] < ends[1] <= 1:
            raise HardAttentionError(
                f"budget={shown(value)} is out of range at {shown(where)}; a sampled budget is two ratios to KEEP, the lower one first, "
                'in (0, 1]. Write {"sample": [0.1, 1.0]}.'
            )
        return cls(float(ends[0]), float(ends[1]))

    @property
    def end(self) -> float:
        """The ratio in evaluation, until ``set_budget`` changes it."""
        return self.low

    def __call__(self, step: int, total: int = 0) -> float:
        """Return the ratio of an optimizer step, counted from 0."""
        return self.low * (self.high / self.low) ** ((0.5 + step * _GOLDEN) % 1.0)


def read_schedule(value: Any, where: str) -> Any:
    """Return the form that a configuration stores: a number, or a dict whose ``steps`` and ``delay`` are an int or a float.

    Raises:
        HardAttentionError: see ``Schedule.parse``.
    """
    Schedule.parse(value, where)
    return {key: read_amount(item, key, where) for key, item in value.items()} if isinstance(value, Mapping) else value


def write_schedule(value: Any) -> Any:
    """Return the JSON form, in which ``steps`` and ``delay`` are marked as a count or a ratio; anything else is unchanged."""
    if not isinstance(value, Mapping):
        return value
    return {key: write_amount(item) if key in ("steps", "delay") else item for key, item in value.items()}


def _check_value(name: str, value: Any, where: str) -> None:
    if not is_number(value) or not abs(value) <= LARGEST:
        raise HardAttentionError(
            f"{name}={shown(value)} of a schedule at {shown(where)} is not a finite number; start and end are numbers of "
            f"at most {LARGEST:g}."
        )


def _check_steps(name: str, count: Any, low: int, where: str) -> None:
    share = isinstance(count, float) and name != "stages" and 0.0 < count <= 1.0
    whole = isinstance(count, int) and not isinstance(count, bool) and low <= count <= MOST_COUNT
    if not share and not whole:
        raise HardAttentionError(
            f"{name}={shown(count)} of a schedule at {shown(where)}; an int counts optimizer steps, >= {low} and <= {MOST_COUNT}; "
            "steps and delay may also be a float in (0, 1], a share of all training steps."
        )
