"""The base class of the distributions over k-subsets."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Used in place of -inf: its exp() is also 0, but it cannot lead to inf - inf = NaN in a backward pass.
LOW = -1e30


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Turn uniform noise into standard Gumbel noise, ``-log(-log(u))``, in fp32.

    Args:
        uniform: fp32, any shape, in [0, 1]; 0 and 1 are moved to the nearest number inside, so that the result is in [-4.5, 16.7].

    Source: Gumbel (1954); Maddison et al. 2014, arXiv:1411.0030.
    """
    limits = torch.finfo(torch.float32)
    return -torch.log(-torch.log(uniform.float().clamp(limits.tiny, 1 - limits.eps / 2)))


class SubsetLaw:
    """A law over k-subsets; ``free`` marks the rows that have a choice, ``active`` their valid positions."""

    def __init__(self, scores: Tensor, k: Tensor, valid: Tensor, slots: int | None = None) -> None:
        """Set up the law.

        Args:
            scores: fp32 ``[..., N]``, finite, already divided by the temperature.
            k: int64 ``[...]`` (or broadcastable), size of the subset; rows with fewer valid positions keep them all.
            valid: bool, broadcastable to ``scores``; False positions have probability 0.
            slots: upper bound of ``k``, passed separately to avoid a device synchronisation; N by default. A larger
                ``k`` counts as ``slots``, and 0 is allowed: no row then has a choice.
        """
        n = scores.shape[-1]
        most = n if slots is None else min(slots, n)
        # At least one slot, whatever ``most`` is: an empty top-k has no k-th score to look up.
        self.slots = max(1, most)
        self.valid = valid.expand_as(scores)
        count = self.valid.sum(-1)
        self.k = torch.minimum(k.expand(scores.shape[:-1]), count).clamp(0, most)
        self.free = (self.k > 0) & (self.k < count)
        self.active = self.valid & self.free.unsqueeze(-1)
        # Rows without a choice keep everything or nothing.
        self.forced = self.valid & ((self.k > 0) & ~self.free).unsqueeze(-1)
        self.scores = scores if scores.dtype == torch.float64 else scores.float()  # float64: for exact checks

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a subset and return it with its log-probability, which carries the gradient to the scores.

        Args:
            uniform: fp32 ``[..., N]`` in [0, 1].

        Returns:
            bool ``[..., N]`` with exactly ``min(k, valid)`` True per row, all at valid positions; fp32 ``[...]``.
        """
        outcome = self.outcome(uniform)
        return self.mask_of(outcome), self.log_prob(outcome)

    def explore(self, uniform: Callable[[tuple[int, ...]], Tensor], rate: float) -> tuple[Tensor, Tensor]:
        """Draw from the mixture ``(1 - rate) law + rate uniform law``, row by row, with the mixture's own log-probability.

        A score function thus stays unbiased for the mixture it samples from, and its gradient stays bounded: the gradient is
        damped where the law gives the drawn subset a lower probability than the uniform law does.

        Args:
            uniform: draws fp32 noise in [0, 1] of a given shape. rate: in [0, 1]; 0 is the same as ``draw``.
        """
        shape = tuple(self.scores.shape)
        if rate == 0:
            return self.draw(uniform(shape))
        explores = uniform(shape[:-1]) < rate
        outcome = self.outcome(uniform(shape), explores)
        mask, log_prob, flat = self.mask_of(outcome), self.log_prob(outcome), self.uniform_log_prob()
        if rate < 1:
            flat = torch.logaddexp(log_prob + math.log1p(-rate), flat + math.log(rate))
        return mask, torch.where(self.free, flat, 0.0)

    def outcome(self, uniform: Tensor, flat: Tensor | None = None) -> Tensor:
        """Draw an argument for ``log_prob``: an order or a mask; rows where ``flat`` is True draw from the uniform law."""
        raise NotImplementedError

    def mask_of(self, outcome: Tensor) -> Tensor:
        """Return the set of an outcome: bool ``[..., N]`` with exactly ``min(k, valid)`` True per row."""
        raise NotImplementedError

    def log_prob(self, outcome: Tensor) -> Tensor:
        """Return the log-probability of an outcome, fp32 ``[...]``."""
        raise NotImplementedError

    def uniform_log_prob(self) -> Tensor:
        """Return the log-probability of any outcome if all scores were equal, fp32 ``[...]``."""
        raise NotImplementedError

    def entropy(self) -> Tensor:
        """Return an entropy of the law, fp32 ``[...]``, in nats; 0 in rows without a choice."""
        raise NotImplementedError
