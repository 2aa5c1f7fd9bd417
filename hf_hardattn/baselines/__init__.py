"""Baselines: variance reduction of score-function estimators. One file each; the file name is the registered name."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class Base(nn.Module):
    """A baseline for the reward of a score-function estimator.

    Class attributes:
        needs_greedy: the reward of the deterministic choice is computed (a second forward pass) and handed over.
        needs_summary: the mean state of the site's candidates is handed over.
    """

    needs_greedy: ClassVar[bool] = False
    needs_summary: ClassVar[bool] = False

    def build(self, hidden_size: int) -> None:
        """Make the parameters, for candidates of ``hidden_size``."""

    def reset_parameters(self) -> None:
        """Initialise the parameters, where a baseline has any."""

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
