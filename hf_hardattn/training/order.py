"""The order of the training data: which example comes at which point of the whole training, on any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler


class Order(Sampler[int]):
    """Rows of the whole training, one permutation an epoch after the other, from ``start`` to ``stop``.

    What stands at a place depends on the seed and the number of rows alone, so a resumed run sees the same again, whatever it
    was cut into. Epochs follow one another within a batch: no batch is short, and no example is drawn twice to fill one up.

    Args:
        rows: how many there are, >= 1. seed: of the permutations.

    Attributes:
        start, stop: places, set before it is iterated.
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
        """The rows in the order of ``epoch``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.rows, generator=generator).tolist()


class Streamed(IterableDataset[Any]):
    """A streamed data set, once an epoch over and over, from ``start`` to ``stop``: the same places as ``Order``'s.

    The rows before ``start`` are read and dropped: a resume is exact, and takes the time of reading them.

    Args:
        data: a ``datasets.IterableDataset``; shuffled, it reshuffles each epoch.
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
