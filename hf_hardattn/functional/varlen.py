"""Pack rows of different lengths into one sequence, instead of padding all of them to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of padding from which packing is taken: its two copies of the rows and an attention call per length cost a layer less.
WASTE = 0.1


@dataclass(frozen=True)
class Packing:
    """How padded rows ``[B, K, D]`` lie end to end as ``[1, T, D]``, T the number of positions in use: shortest row first, so that rows
    of equal length are neighbours, and a view of the packed tensor is a batch without padding.

    Attributes:
        runs: ``(length, count)`` of the rows of equal length, in packed order.
        order: int64 ``[B]``, the row at each place of that order. back: its inverse.
        places: int64 ``[T]``, where each packed position stands among the B * K padded ones.
        sources: int64 ``[B * K]``, the packed position that a padded one reads; unused slots repeat a position in use.
    """

    runs: tuple[tuple[int, int], ...]
    order: Tensor
    back: Tensor
    places: Tensor
    sources: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int] | None, slots: int, device: torch.device) -> Packing | None:
        """Pack rows of which the first ``lengths[b]`` of ``slots`` positions are in use; None where that would save nearly nothing.

        Packs when at least ``WASTE`` of the padded positions are unused, and no row is empty.
        """
        if lengths is None or min(lengths) < 1 or sum(lengths) > (1 - WASTE) * len(lengths) * slots:
            return None
        rows = sorted(range(len(lengths)), key=lengths.__getitem__)
        ordered = [lengths[row] for row in rows]
        runs = tuple((length, ordered.count(length)) for length in sorted(set(ordered)))
        order, sizes = torch.tensor([rows, ordered], device=device)
        back = order.argsort()
        starts = sizes.cumsum(0) - sizes
        total = sum(lengths)
        places = (order * slots - starts).repeat_interleave(sizes, output_size=total) + torch.arange(
            total, device=device
        )
        slot = torch.arange(slots, device=device)
        sources = starts[back, None] + torch.minimum(slot, sizes[back, None] - 1)
        return cls(runs, order, back, places, sources.flatten())

    def to_packed(self, rows: Tensor) -> Tensor:
        """``[B, K, D]`` to ``[1, T, D]``."""
        return rows.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def to_padded(self, packed: Tensor) -> Tensor:
        """``[1, T, D]`` to ``[B, K, D]``; what the unused slots hold means nothing."""
        return packed[0].index_select(0, self.sources).unflatten(0, (len(self.order), -1))

    def heads_to_padded(self, packed: Tensor) -> Tensor:
        """``[1, H, T, d]`` to ``[B, H, K, d]``."""
        rows = self.to_padded(packed.transpose(1, 2).flatten(2))
        return rows.unflatten(-1, (packed.shape[1], -1)).transpose(1, 2)

    def batches(self, *packed: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """The rows of each length: their numbers in the batch ``[G]``, and their part of every ``[1, H, T, d]``, a view ``[G, H, length, d]``."""
        row = start = 0
        for length, count in self.runs:
            end = start + length * count
            parts = tuple(t[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for t in packed)
            yield self.order[row : row + count], parts
            row, start = row + count, end
