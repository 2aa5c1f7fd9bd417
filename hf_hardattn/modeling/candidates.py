"""The candidates of a choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Protected(NamedTuple):
    """Rows that are always kept and are not part of the choice.

    Attributes:
        first: number of protected rows at the start (CLS, registers).
        last: whether the last valid row (``</s>``) is protected.
    """

    first: int = 0
    last: bool = False

    @property
    def rows(self) -> int:
        """Number of protected rows among the candidates of one example."""
        return self.first + int(self.last)

    def mask(self, shape: tuple[int, int], valid: Tensor | None, device: torch.device) -> Tensor | None:
        """Return which rows are protected, bool ``[B, N]``; None if none is."""
        if not self.rows:
            return None
        place = torch.arange(shape[1], device=device).expand(shape)
        if not self.last:
            return place < self.first
        last: Any = shape[1] - 1 if valid is None else torch.where(valid, place, -1).amax(-1, keepdim=True)
        return (place < self.first) | (place == last) if self.first else place == last


@dataclass
class Candidates:
    """The candidates of a choice.

    Attributes:
        valid: bool, broadcastable to ``[B, H, Q, N]``; None if every position is valid.
        protected: bool ``[B, 1, 1, N]``, see ``Protected``; None if nothing is protected, or if ``ends`` describes it.
        ends: the protected rows at the ends; if ``protected`` places them elsewhere, only how many there are.
        bound: upper bound of the number of valid candidates of a row.
        varied: the number of protected rows differs between the rows of the batch and is known from ``protected`` only.
        notes: results computed from ``valid``, shared by all choices among the same rows.
    """

    valid: Tensor | None = None
    protected: Tensor | None = None
    ends: Protected = Protected()
    bound: int | None = None
    varied: bool = False
    notes: dict[Any, Tensor] = field(default_factory=dict)

    def noted(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """Return what ``make`` computes from ``valid``, computed once for all choices among the same rows to save GPU operations."""
        if name not in self.notes:
            self.notes[name] = make()
        return self.notes[name]

    def masks(self, scores: Tensor) -> Masks:
        """Return the masks of a choice by ``scores`` ``[B, H, Q, N]``, all of one shape."""
        n = scores.shape[-1]
        everything = self.valid is None
        valid: Tensor = scores.new_ones((1, 1, 1, n), dtype=torch.bool) if self.valid is None else self.valid
        # torch.broadcast_shapes would take longer than the choice itself
        shape = tuple(size if other == 1 else other for size, other in zip(scores.shape, valid.shape, strict=True))
        valid, protected = valid.expand(shape), self.protected_mask(n, scores.device)
        if protected is None:
            return Masks(valid, valid, None)
        if everything:
            return Masks(valid, (~protected).expand(shape), protected)
        return Masks(valid, valid & ~protected, valid & protected)

    def protected_mask(self, n: int, device: torch.device) -> Tensor | None:
        """Return which of ``n`` candidates are protected, bool ``[B or 1, 1, 1, N]``; None if none is."""
        if self.protected is not None or not self.ends.rows:
            return self.protected
        valid = None if self.valid is None else self.valid[:, 0, 0]
        mask: Any = self.ends.mask((1 if valid is None else len(valid), n), valid, device)
        return mask[:, None, None]


class Masks(NamedTuple):
    """Candidates as masks, bool ``[B, H, Q, N]``.

    Attributes:
        valid: what may be kept. free: the valid candidates that may be chosen. protected: those that are always kept; None if there are
            none.
    """

    valid: Tensor
    free: Tensor
    protected: Tensor | None


@dataclass
class TrainingInputs:
    """Further inputs of a choice in training.

    Attributes:
        summary: fp32 ``[B, D]`` or None; mean state, detached, for a learned baseline.
        keys: fp32 ``[B, N, d]`` or None; for an inference network.
        target: states of the labels ``[B, T, D]`` or None; for an inference network.
        values: fp32 ``[B, N, d]`` or None; for an auxiliary head.
        classes: int64 ``[B]`` or None; the targets of an auxiliary head.
    """

    summary: Tensor | None = None
    keys: Tensor | None = None
    target: Tensor | None = None
    values: Tensor | None = None
    classes: Tensor | None = None
