"""Baselines: variance reduction for score-function estimators. Each has its own file, whose name is the registered name."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, distributed, nn

from ..options import Configurable


class Baseline(Configurable, nn.Module):
    """A baseline for the reward of a score-function estimator.

    Class attributes:
        needs_greedy: whether ``forward`` needs the reward of the deterministic choice, which takes a second forward pass of the model.
        needs_summary: whether ``forward`` needs the mean state of the site's candidates.
        run_state: names of attributes that describe the run and not the model, each a tensor or None. They are no buffers, which copies
            of a model and its checkpoints would contain; ``Driver`` saves them.

    Attributes:
        deferred: True if the training loop calls ``update`` once per optimizer step; False if each ``forward`` calls it.
    """

    kind = "baseline"
    needs_greedy: ClassVar[bool] = False
    needs_summary: ClassVar[bool] = False
    run_state: ClassVar[tuple[str, ...]] = ()
    deferred: bool = False

    def build(self, hidden_size: int) -> None:
        """Create the parameters, for candidates of ``hidden_size``."""

    def reset_parameters(self) -> None:
        """Initialise the parameters, if the baseline has any."""

    def update(self) -> None:
        """Update the baseline's state, if it has one, with the rewards of all micro-batches and ranks of an optimizer step."""

    def scale(self) -> Tensor | None:
        """Return the factor for ``reward - baseline``, fp32 ``[]``; it is known before the batch. None means 1."""
        return None

    def loss(self, value: Tensor, reward: Tensor) -> Tensor | None:
        """Return a term of the training loss that trains the baseline itself, or None if it has nothing to learn."""
        return None

    def forward(self, reward: Tensor, greedy: Tensor | None = None, summary: Tensor | None = None) -> Tensor:
        """Return the baseline of each example.

        Args:
            reward: fp32 ``[B]``, detached, rewards of the sampled choices; higher = better.
            greedy: fp32 ``[B]``, detached, rewards of the deterministic choices; passed if ``needs_greedy``.
            summary: fp32 ``[B, D]``, detached, mean states of the candidates; passed if ``needs_summary``.

        Returns:
            fp32 ``[B]``. The value of an example must not depend on that example's own sample, so that the gradient stays unbiased.
        """
        raise NotImplementedError


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum ``values`` over all ranks; with a single rank they are returned unchanged. Every rank must call this function."""
    if distributed.is_available() and distributed.is_initialized():
        values = values.clone()
        distributed.all_reduce(values)
    return values
