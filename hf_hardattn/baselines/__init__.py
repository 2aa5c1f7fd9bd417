"""Baselines: variance reduction of score-function estimators. One file each; the file name is the registered name."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, distributed, nn

from ..options import Configurable


class Baseline(Configurable, nn.Module):
    """A baseline for the reward of a score-function estimator.

    Class attributes:
        needs_greedy: the reward of the deterministic choice is computed (a second forward pass) and handed over.
        needs_summary: the mean state of the site's candidates is handed over.

    Attributes:
        deferred: whoever drives the training calls ``update`` once an optimizer step; otherwise each forward does it itself.
    """

    kind = "baseline"
    needs_greedy: ClassVar[bool] = False
    needs_summary: ClassVar[bool] = False
    deferred: bool = False

    def build(self, hidden_size: int) -> None:
        """Make the parameters, for candidates of ``hidden_size``."""

    def reset_parameters(self) -> None:
        """Initialise the parameters, where a baseline has any."""

    def update(self) -> None:
        """Take in the rewards of an optimizer step, of all its micro-batches and ranks, where a baseline has a state."""

    def scale(self) -> Tensor | None:
        """What to multiply ``reward - baseline`` by, fp32 ``[]``, known before the batch; None for 1."""
        return None

    def loss(self, value: Tensor, reward: Tensor) -> Tensor | None:
        """A term of the training loss that teaches the baseline itself; None when it learns nothing."""
        return None

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return the baseline of each example.

        Args:
            reward: fp32 ``[B]``, detached, of the sampled choices; higher = better.
            greedy: fp32 ``[B]``, detached, of the deterministic choices; given when ``needs_greedy``.
            summary: fp32 ``[B, D]``, detached; given when ``needs_summary``.

        Returns:
            fp32 ``[B]``, independent of the same example's own sample, so that the gradient stays unbiased.
        """
        raise NotImplementedError


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up ``values`` over all ranks; as they are where there is one. Every rank must call it."""
    if distributed.is_available() and distributed.is_initialized():
        values = values.clone()
        distributed.all_reduce(values)
    return values
