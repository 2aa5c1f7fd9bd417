"""The record of the rows of a prompt that a selection left in a decoder's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

MEMORY = "hard_attention_prompt"  # attribute of a cache: its PromptMemory


class CachedRows:
    """The rows of a prompt that one layer's cache holds, before the rows generated since.

    It is a plain class, because layers whose caches hold the same rows share one instance and recognise it by its identity. It has no
    ``__slots__``, because exporters take a cache apart by the attributes of its contents.

    Attributes:
        count: K, number of rows. valid: bool ``[B, K]``, rows that may be read; None if all may.
        positions: int64 ``[B, K]``, their positions in the prompt; None if no row of it is missing.
    """

    def __init__(self, count: int, valid: Tensor | None, positions: Tensor | None):
        self.count, self.valid, self.positions = count, valid, positions

    def map(self, change: Callable[[Any], Any]) -> None:
        """Change the examples as those of the cache were changed, see ``cache.follow``."""
        self.valid, self.positions = change(self.valid), change(self.positions)


class PromptMemory:
    """The record stored with the cache of a prompt.

    Attributes:
        rows: N, rows of the prompt. whole: the record of layers that hold all of them.
        answer: bool ``[B or 1, N]``, rows that were read together with the prompt but are not part of it; None if there are none.
        layers: dict from layer to the rows that its cache holds, if some are missing.
        padded: later calls of several rows were padded.
    """

    def __init__(self, rows: int, valid: Tensor | None = None, answer: Tensor | None = None):
        self.rows, self.whole, self.answer = rows, CachedRows(rows, valid, None), answer
        self.layers: dict[int, CachedRows] = {}
        self.padded = False

    def of(self, layer: int) -> CachedRows | None:
        """Return the rows that a layer's cache holds; None if the mask made by Transformers fits it."""
        known = self.layers.get(layer)
        if known is not None or not self.layers or min(self.layers) > layer:
            return known
        return self.whole  # Transformers sizes its mask by the first layer, whose cache is shorter

    def map(self, change: Callable[[Any], Any]) -> None:
        """Change the examples as those of the cache were changed; layers that share a record continue to share it."""
        for record in {id(rows): rows for rows in (self.whole, *self.layers.values())}.values():
            record.map(change)
