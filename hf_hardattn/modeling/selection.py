"""The outcome of a discrete choice at one site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional.topk import mask_to_indices
from .candidates import Candidates


class Selection:
    """What one site kept in one forward pass.

    Shapes: B batch, H heads (1 when shared), Q queries (1 when shared), N candidates, K slots (K >= kept).

    A choice made by sorting stores its ``indices`` and computes ``mask``, ``valid`` and ``protected`` only when they are read. Any other
    choice stores its ``mask`` and computes ``indices`` when they are read.

    Attributes:
        site: name of the site, ``tower.kind.layer``.
        mask: bool ``[B, H, Q, N]``, True where the position is kept; never True where ``valid`` is False.
        valid: bool, broadcastable to ``mask``; False for padding, and for the future in causal attention.
        protected: bool, broadcastable to ``mask``, or None; always kept, not part of the choice (CLS, a T5 row's ``</s>``).
        scores: fp32, broadcastable to ``mask``; higher = keep.
        gates: fp32, shape of ``mask`` or None; 1 at kept positions in the forward pass, the estimator's gradient in the backward pass.
        log_prob: fp32 ``[B, H, Q]`` or None; log-probability of the sampled choice under the estimator's own distribution.
        entropy: fp32 ``[B, H, Q]`` or None; entropy of that distribution, in nats.
        penalty: fp32 ``[B, H, Q]`` or None; a term of the training loss.
        summary: fp32 ``[B, D]`` or None; mean of the candidates' states, detached, for a learned baseline.
        slots: K, an upper bound of kept positions per row (static where the budget allows it).
        dense: every row is known to fill all its slots, without waiting for the device.
        masked: all candidates are computed, and the choice weighs them; False: dropped candidates are not computed.
        positions: int64 ``[B, N]`` or None; position of each candidate in the tower's input, if earlier sites dropped some.
        counted: the number of kept positions of a row is known only from the choice, because the scores or a replay determine it.
        lengths: number of kept positions of each of the B rows (H = Q = 1), if the host had to read them; None otherwise.
        call: an object that all recorded selections of one call of the model share; None if it was not recorded.
    """

    call: object | None = None

    def __init__(
        self,
        site: str,
        mask: Tensor | None,
        valid: Tensor | None,
        protected: Tensor | None,
        scores: Tensor,
        gates: Tensor | None = None,
        log_prob: Tensor | None = None,
        entropy: Tensor | None = None,
        penalty: Tensor | None = None,
        summary: Tensor | None = None,
        slots: int = 0,
        dense: bool = False,
        masked: bool = False,
        positions: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
        indices: Tensor | None = None,
        used: Tensor | None = None,
        candidates: Candidates | None = None,
        counted: bool = False,
    ):
        self.site, self.scores, self.gates = site, scores, gates
        self.log_prob, self.entropy, self.penalty, self.summary = log_prob, entropy, penalty, summary
        self.slots, self.dense, self.masked = slots, dense, masked
        self.positions, self.lengths, self.counted = positions, lengths, counted
        self._mask, self._valid, self._protected, self._indices = mask, valid, protected, indices
        # of a choice stored as indices: which slots hold a kept position (None: all), and its candidates
        self._used, self._candidates = used, candidates

    def __repr__(self) -> str:
        kept = "indices" if self._mask is None else "mask"
        return f"Selection({self.site!r}, {self.slots} of {self.scores.shape[-1]} positions, by {kept})"

    @property
    def mask(self) -> Tensor:
        if self._mask is None:
            n, indices = self.scores.shape[-1], self.indices
            empty = torch.zeros((*indices.shape[:-1], n), dtype=torch.bool, device=self.scores.device)
            self._mask = empty.scatter(-1, indices, True if self._used is None else self.slot_mask)
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self._mask, self._indices, self._used = mask, None, None

    @property
    def valid(self) -> Tensor:
        if self._valid is None:
            n, rows = self.scores.shape[-1], self.indices.shape[:-1]
            valid = None if self._candidates is None else self._candidates.valid
            valid = torch.ones(n, dtype=torch.bool, device=self.scores.device) if valid is None else valid
            self._valid = valid.expand(*rows, n)
        return self._valid

    @valid.setter
    def valid(self, valid: Tensor) -> None:
        self._valid = valid

    @property
    def protected(self) -> Tensor | None:
        if self._protected is None and self._candidates is not None:
            protected = self._candidates.protected_mask(self.scores.shape[-1], self.scores.device)
            if protected is not None and self._candidates.valid is not None:
                protected = protected & self.valid
            self._protected = protected
        return self._protected

    @protected.setter
    def protected(self, protected: Tensor | None) -> None:
        self._valid, self._protected, self._candidates = self.valid, protected, None

    @property
    def own(self) -> Selection:
        """The selection as its site made it, without the values that only a recording computes."""
        return self

    @property
    def indices(self) -> Tensor:
        """Indices of the kept positions, int64 ``[B, H, Q, K]``, ascending; unused slots come last (see ``slot_mask``)."""
        if self._indices is None:
            self._indices = mask_to_indices(self.mask, self.slots)
        return self._indices

    @property
    def slot_mask(self) -> Tensor:
        """Bool ``[B, H, Q, K]``: True where the slot of ``indices`` holds a kept position."""
        return self.mask.gather(-1, self.indices) if self._used is None else self._used.expand_as(self.indices)

    @property
    def slot_valid(self) -> Tensor | None:
        """``slot_mask``, or None if every row is known to fill all its slots."""
        return None if self.dense else self.slot_mask

    @property
    def places(self) -> Tensor:
        """``indices`` as positions in the tower's input, int64 ``[B, H, Q, K]``, as a rationale shows them."""
        if self.positions is None:
            return self.indices
        shape = self.indices.shape
        positions = self.positions[:, None, None].expand(-1, *shape[1:3], -1)
        return positions.gather(-1, self.indices.expand(positions.shape[0], -1, -1, -1))

    @property
    def kept_ratio(self) -> Tensor:
        """Kept share of the valid candidates, fp32 ``[B, H, Q]``; protected positions are not counted."""
        choice, candidates = self.mask, self.valid.expand_as(self.mask)
        if self.protected is not None:
            choice, candidates = choice & ~self.protected, candidates & ~self.protected
        return choice.sum(-1) / candidates.sum(-1).clamp(min=1)

    def replace(self, **changes: Any) -> Selection:
        """Return a copy with some attributes changed."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        for name, value in {"site": self.site, **changes}.items():
            setattr(copy, name, value)
        return copy

    __replace__ = replace  # for copy.replace, from Python 3.13 on
