"""A row of random tokens with four that matter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, T5ForConditionalGeneration

from . import TEST_SEED, Base, Batch, Recipe

PAD, END, FIRST = 0, 1, 2  # ids: padding (and the decoder's start), </s>, and the first informative one


class PlantedRationale(Base):
    """Say the informative tokens of a row in the order of their slots. Gold: where they are.

    Slot j has ``values`` tokens of its own; one of them stands at a random place of the row, for each slot, among tokens that mean
    nothing. A ``T5ForConditionalGeneration``, whose decoder reads nothing but the encoder's output and the answers before:
    ``T5ForSequenceClassification`` would hand its decoder the whole row.

    Args:
        length: tokens of a row besides ``</s>``. slots: informative ones. values: of each slot. fillers: tokens that mean nothing.
        test_rows: of the fixed test set.
    """

    model_class = T5ForConditionalGeneration
    site = "encoder.inputs"
    scorer = "mlp"  # no direction separates the informative tokens' random embeddings from the others'
    budget = 4 / 64
    recipe = Recipe(trunk_steps=300, branch_steps=300, batch=32)

    def __init__(
        self, length: int = 64, slots: int = 4, values: int = 8, fillers: int = 200, test_rows: int = 1000
    ) -> None:
        self.length, self.slots, self.values, self.fillers, self.test_rows = length, slots, values, fillers, test_rows

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(
            "t5",
            vocab_size=FIRST + self.slots * self.values + self.fillers,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=PAD,
        )

    def rows(self, size: int, generator: torch.Generator) -> Batch:
        """Draw ``size`` rows with their gold positions."""
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

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        return self.rows(size, generator).inputs

    def test(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(TEST_SEED)
        for start in range(0, self.test_rows, 250):
            yield self.rows(min(250, self.test_rows - start), generator)
