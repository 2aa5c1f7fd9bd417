"""Soft: keep everything, as the original model does."""

from __future__ import annotations

from torch import Tensor

from . import Choice, Estimator, Sampling


class Soft(Estimator):
    """Keep every valid position, in training and in evaluation; the budget is ignored.

    ``gate_i = 1[i valid]`` is a constant: the output is that of the original model, and the scorer's gradient is zero (zero and not
    None, since distributed training waits for every parameter). Use it for warm-up, and for comparisons within one configuration.

    Source: the attention of the model itself.
    """

    biased = False
    needs = ("gates",)
    exact_budget = False
    source = "the model's own attention"

    def choose(
        self, scores: Tensor, k: Tensor, valid: Tensor, *, slots: int, sampling: Sampling | None = None
    ) -> Choice:
        """Keep every valid position; only the shape of ``scores`` and ``valid`` are used."""
        mask = valid.expand_as(scores).clone()
        return Choice(mask, gates=mask + 0.0 * scores)
