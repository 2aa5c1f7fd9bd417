"""The order of the training data over the whole training, independent of the number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler


class Order(Sampler[int]):
    """Row numbers for the whole training, one permutation per epoch, from place ``start`` to ``stop``.

    The row at a place depends only on the seed and the number of rows, so a resumed run sees the same order however its batches are
    split. A batch may span two epochs: no batch is short, and no example is drawn twice to fill one.

    Args:
        rows: number of rows, >= 1. seed: seed of the permutations.

    Attributes:
        start, stop: places in the order, set before iteration.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.start, self.stop = rows, seed, 0, 0

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        place = self.start
        while place < self.stop:
            epoch, offset = divmod(place, self.rows)
            yield from self.permutation(epoch)[offset : offset + self.stop - place]
            place += self.rows - offset

    def permutation(self, epoch: int) -> list[int]:
        """Return the rows in the order of ``epoch``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.rows, generator=generator).tolist()


class Streamed(IterableDataset[Any]):
    """A streamed data set, repeated for each epoch, from place ``start`` to ``stop`` as in ``Order``.

    The rows before ``start`` are read and dropped, so a resume is exact but takes the time to read them.

    Args:
        data: a ``datasets.IterableDataset``; if it is shuffled, it is reshuffled in each epoch.
    """

    def __init__(self, data: Any) -> None:
        self.data, self.start, self.stop = data, 0, 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._rows(), self.start, self.stop)

    def _rows(self) -> Iterator[Any]:
        for epoch in itertools.count():
            self.data.set_epoch(epoch)
            empty = True
            for row in self.data:
                empty = False
                yield row
            if empty:
                return
