"""A planted rationale: a few informative tokens among random ones."""

from __future__ import annotations

import torch

from . import Batch, Recipe
from ._drawn import END, FIRST, Drawn


class PlantedRationale(Drawn):
    """Output the informative tokens of a row in the order of their slots. Gold: their positions.

    Each slot has its own vocabulary of ``values`` tokens. For each slot one of them is placed at a random position of the row, among
    filler tokens that carry no information. The model is a ``T5ForConditionalGeneration``, whose decoder reads only the encoder's output
    and its previous answers: ``T5ForSequenceClassification`` would pass the whole row to its decoder.

    Args:
        length: tokens per row besides ``</s>``. slots: informative tokens per row. fillers: number of different filler tokens.
        values: tokens per slot. A selection may drop one value of a slot, because its absence identifies it: with 8 values a perfect
            answer needs only 97 % of the gold positions, with 64 values all but 0.4 %.
        test_rows: size of the fixed test set.
    """

    site = "encoder.inputs"
    budget = 4 / 64
    recipe = Recipe(trunk_steps=600, branch_steps=400, batch=32)

    def __init__(
        self, length: int = 64, slots: int = 4, values: int = 64, fillers: int = 200, test_rows: int = 1000
    ) -> None:
        self.length, self.slots, self.values, self.fillers, self.test_rows = length, slots, values, fillers, test_rows

    @property
    def vocabulary(self) -> int:
        return FIRST + self.slots * self.values + self.fillers

    def rows(self, size: int, generator: torch.Generator) -> Batch:
        filler = FIRST + self.slots * self.values
        tokens = filler + torch.randint(self.fillers, (size, self.length), generator=generator)
        places = torch.rand(size, self.length, generator=generator).argsort(-1)[:, : self.slots]
        informative = FIRST + torch.arange(self.slots) * self.values
        informative = informative + torch.randint(self.values, (size, self.slots), generator=generator)
        tokens = tokens.scatter(1, places, informative)
        gold = torch.zeros(size, self.length + 1, dtype=torch.bool).scatter(1, places, True)
        return Batch(
            {"input_ids": torch.nn.functional.pad(tokens, (0, 1), value=END), "labels": informative}, gold[:, None]
        )
