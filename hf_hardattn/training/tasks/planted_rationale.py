"""A row of random tokens with four that matter."""

from __future__ import annotations

import torch

from . import Batch, Recipe
from ._drawn import END, FIRST, Drawn


class PlantedRationale(Drawn):
    """Say the informative tokens of a row in the order of their slots. Gold: where they are.

    Slot j has ``values`` tokens of its own; one of them stands at a random place of the row, for each slot, among tokens that mean
    nothing. A ``T5ForConditionalGeneration``, whose decoder reads nothing but the encoder's output and the answers before:
    ``T5ForSequenceClassification`` would hand its decoder the whole row.

    Args:
        length: tokens of a row besides ``</s>``. slots: informative ones. fillers: tokens that mean nothing.
        values: of each slot. A choice may drop one value of a slot, whose absence then tells it: with 8 of them a perfect answer
            needs no more than 97 % of the gold positions, with 64 all but 0.4 %.
        test_rows: of the fixed test set.
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
