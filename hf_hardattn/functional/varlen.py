"""Pack rows of different lengths into one sequence, instead of padding all of them to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of padding from which rows are packed: a layer then spends less on two copies of the rows and one attention call per length
# than on the padding.
WASTE = 0.1


@dataclass(frozen=True)
class Packing:
    """The layout of padded rows ``[B, K, D]`` that are packed end to end as ``[1, T, D]``, where T is the number of positions in use.

    The shortest row comes first, so that rows of equal length are neighbours, and a view of the packed tensor is a batch without padding.

    Attributes:
        runs: ``(length, count)`` of the rows of equal length, in packed order.
        order: int64 ``[B]``, the row at each place in packed order. back: its inverse.
        places: int64 ``[T]``, the index of each packed position among the B * K padded ones.
        sources: int64 ``[B * K]``, the packed position that a padded one reads; unused slots repeat a position in use.
    """

    runs: tuple[tuple[int, int], ...]
    order: Tensor
    back: Tensor
    places: Tensor
    sources: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int] | None, slots: int, device: torch.device) -> Packing | None:
        """Return the layout of rows whose first ``lengths[b]`` of ``slots`` positions are in use; None if packing would save almost
        nothing.

        Rows are packed if at least ``WASTE`` of the padded positions are unused, and no row is empty.
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
        """Pack ``[B, K, D]`` to ``[1, T, D]``."""
        return rows.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def to_padded(self, packed: Tensor) -> Tensor:
        """Unpack ``[1, T, D]`` to ``[B, K, D]``; the content of the unused slots is meaningless."""
        return packed[0].index_select(0, self.sources).unflatten(0, (len(self.order), -1))

    def heads_to_padded(self, packed: Tensor) -> Tensor:
        """Unpack ``[1, H, T, d]`` to ``[B, H, K, d]``."""
        rows = self.to_padded(packed.transpose(1, 2).flatten(2))
        return rows.unflatten(-1, (packed.shape[1], -1)).transpose(1, 2)

    def batches(self, *packed: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Yield the rows of each length: their indices in the batch ``[G]``, and a view ``[G, H, length, d]`` of every ``[1, H, T, d]``."""
        row = start = 0
        for length, count in self.runs:
            end = start + length * count
            parts = tuple(t[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for t in packed)
            yield self.order[row : row + count], parts
            row, start = row + count, end
