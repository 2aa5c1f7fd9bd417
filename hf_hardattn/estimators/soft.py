"""Soft: keep everything; the model as it was."""

from __future__ import annotations

from torch import Tensor

from . import Choice, Estimator, Sampling


class Soft(Estimator):
    """Keep every valid position, in training and in evaluation; the budget is ignored.

    ``gate_i = 1[i valid]``, a constant: the output is the stock model's, the scorer's gradient is zero (zero, not absent:
    distributed training waits for every parameter). For warm-up and for comparisons inside one configuration.

    Source: the attention of the model itself.
    """

    biased = False
    needs = ("gates",)
    exact_budget = False
    source = "the model's own attention"

    def choose(
        self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling | None = None
    ) -> Choice:
        """Keep every valid position; only ``scores`` (its shape) and ``valid`` are used."""
        mask = valid.expand_as(scores).clone()
        return Choice(mask, gates=mask + 0.0 * scores)
