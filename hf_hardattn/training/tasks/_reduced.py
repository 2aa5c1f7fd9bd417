"""A task on smaller inputs: the control that has equal cost but selects nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import Base, Batch


class Reduced:
    """A task with its inputs reduced to the number of rows that a budget of ``ratio`` keeps; the rest is unchanged."""

    def __init__(self, task: Base, ratio: float) -> None:
        self.task, self.ratio = task, ratio

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        """Draw a training batch."""
        return self.task.reduced(self.task.draw(size, generator, difficulty), self.ratio)

    def test(self) -> Iterator[Batch]:
        """Yield the test set in batches."""
        for batch in self.task.test():
            yield Batch(self.task.reduced(batch.inputs, self.ratio))

    def evaluate(self, model: Any, batches: int | None = None) -> dict[str, float]:
        """Test ``model``."""
        return Base.evaluate(self, model, batches)  # type: ignore[arg-type]
