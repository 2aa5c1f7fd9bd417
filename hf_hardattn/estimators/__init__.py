"""Estimators: how the gradient passes the discrete choice. One file each; the file name is the registered name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..selection import topk_mask


@dataclass
class Choice:
    """An estimator's answer for rows ``[..., N]``.

    Attributes:
        mask: bool ``[..., N]``, the kept positions, exactly ``min(k, valid)`` per row.
        gates: fp32 ``[..., N]`` or None; equal to ``mask`` in the forward (a relaxation may differ), gradient to the scores.
        log_prob: fp32 ``[...]`` or None; log-probability of ``mask`` (or of the order drawn) under the sampling law.
        entropy: fp32 ``[...]`` or None; of the sampling law, in nats.
    """

    mask: Tensor
    gates: Tensor | None = None
    log_prob: Tensor | None = None
    entropy: Tensor | None = None


class Base:
    """An estimator. Subclasses declare the facts below, keyword options in ``__init__``, and ``sample``.

    Class attributes:
        biased: whether the expected gradient differs from the exact one.
        pathwise: gradient flows through ``gates`` (needs the masked execution in training); else through ``log_prob``
            (score function: trains gathered, with the saving, and needs a reward).
        source: paper and equation.
    """

    biased: ClassVar[bool]
    pathwise: ClassVar[bool]
    source: ClassVar[str]

    def choose(
        self,
        scores: Tensor,
        k: Tensor,
        valid: Tensor,
        *,
        slots: int,
        training: bool,
        temperature: float = 1.0,
        uniform: Callable[[tuple[int, ...]], Tensor],
    ) -> Choice:
        """Choose ``k`` of the valid positions of each row.

        Args:
            scores: fp32 ``[..., N]``, finite; higher = keep.
            k: int64 ``[...]``, positions to keep; rows with fewer valid ones keep them all.
            valid: bool ``[..., N]``; False positions are never kept.
            slots: static upper bound of ``k``.
            training: False takes the deterministic top-k, whatever the estimator.
            temperature: > 0; divides the scores of the sampling law or of the relaxation.
            uniform: draws fp32 noise in (0, 1) of a shape, on the device of the scores.
        """
        if not training:
            return Choice(topk_mask(scores, k, valid, slots))
        return self.sample(scores, k, valid, slots=slots, temperature=temperature, uniform=uniform)

    def sample(
        self,
        scores: Tensor,
        k: Tensor,
        valid: Tensor,
        *,
        slots: int,
        temperature: float,
        uniform: Callable[[tuple[int, ...]], Tensor],
    ) -> Choice:
        """Choose in training; same arguments as ``choose``."""
        raise NotImplementedError
