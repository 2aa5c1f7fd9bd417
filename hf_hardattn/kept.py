"""The keys that a choice leaves an attention, and what weighs them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .attention import keep_columns
from .packing import Packing
from .selection import Selection
from .stream import as_keys


@dataclass
class Kept:
    """The outcome of one choice for all queries, as an attention reads it: the layer that chose, and those that share its choice.

    Attributes:
        indices: int64 ``[B, H or 1, K]``, ascending; None while all N keys are there.
        used: bool, broadcastable to ``[B, H, 1, K or N]``; None when every key there counts.
        gates: fp32, broadcastable to ``[B, H, 1, N]``, of masked training; None otherwise.
        columns: bias towards the kept keys, ``[B or 1, H, Q, K]``; None where there is none.
        packing: of the kept keys, where rows keep different counts and the host knows them; None otherwise.
    """

    indices: Tensor | None
    used: Tensor | None
    gates: Tensor | None
    columns: Tensor | None = None
    packing: Packing | None = None

    @classmethod
    def of(cls, selection: Selection, columns: Tensor | None = None) -> Kept:
        """Read a selection whose choice serves all queries of a row (Q = 1)."""
        packing = Packing.of(selection.lengths, selection.slots, selection.mask.device)
        if packing is None and (selection.masked or selection.slots >= selection.mask.shape[-1]):
            if selection.gates is not None:
                return cls(None, selection.valid, selection.gates)
            everything = selection.dense and selection.slots >= selection.mask.shape[-1]
            return cls(None, None if everything else selection.mask, None)
        used = None if selection.dense else selection.slot_mask
        return cls(selection.indices[:, :, 0], used, None, columns, packing)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias towards the kept keys: as an earlier layer gathered it, or gathered from ``bias``."""
        if self.columns is not None:
            return self.columns
        return bias if bias is None or self.indices is None else keep_columns(bias, self.indices)


def product(chosen: Tensor | None, upstream: Tensor | None) -> Tensor | None:
    """Gates of a choice ``[B, H, Q, N]`` times those from upstream ``[B, N]``; None stands for all ones."""
    if chosen is None or upstream is None:
        return as_keys(upstream) if chosen is None else chosen
    return chosen * as_keys(upstream)


def pick(upstream: Tensor | None, indices: Tensor) -> Tensor | None:
    """Upstream gates ``[B, N]`` or ``[B, H or 1, 1, N]`` at the kept positions ``[B, H, K]``, as ``[B, H, 1, K]``."""
    if upstream is None:
        return None
    return as_keys(upstream).expand(-1, indices.shape[1], 1, -1).gather(-1, indices.unsqueeze(2))


def spread(probabilities: Tensor | None, indices: Tensor, n: int) -> Tensor | None:
    """Attention weights over the kept slots ``[B, H, Q, K]`` to all keys ``[B, H, Q, n]``, zero where nothing was kept."""
    if probabilities is None:
        return None
    places = indices.unsqueeze(2).expand(-1, probabilities.shape[1], probabilities.shape[2], -1)
    return probabilities.new_zeros(*probabilities.shape[:3], n).scatter(-1, places, probabilities)
