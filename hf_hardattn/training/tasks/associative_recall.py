"""A row of facts, then keys: which values?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, T5ForConditionalGeneration

from . import TEST_SEED, Base, Batch, Recipe

PAD, END, FIRST = 0, 1, 2  # ids: padding, </s>, and the first key


class AssociativeRecall(Base):
    """Say the value that a row gives to each queried key (MQAR). Gold: for each query the position of its fact.

    The encoder reads the facts, the decoder the queries, each of which chooses one position to read: the classic hard attention. A
    fact, a key with its value, is one token here and not two, so that exactly one position holds an answer.

    Args:
        facts: of a row, with different keys. queries: of a row, different keys of it. keys, values: how many there are.
        test_rows: of the fixed test set.

    Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv:2312.04927, section 3.
    """

    model_class = T5ForConditionalGeneration
    site = "decoder.cross.0"
    scorer = "query_key"
    budget = 0.03  # of 17 positions: one
    recipe = Recipe(trunk_steps=1000, branch_steps=400, batch=32)

    def __init__(
        self, facts: int = 16, queries: int = 8, keys: int = 32, values: int = 16, test_rows: int = 500
    ) -> None:
        self.facts, self.queries, self.keys, self.values, self.test_rows = facts, queries, keys, values, test_rows

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(
            "t5",
            vocab_size=FIRST + self.keys + self.values + self.keys * self.values,
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
        keys = torch.rand(size, self.keys, generator=generator).argsort(-1)[:, : self.facts]
        values = torch.randint(self.values, (size, self.facts), generator=generator)
        asked = torch.rand(size, self.facts, generator=generator).argsort(-1)[:, : self.queries]
        facts = FIRST + self.keys + self.values + keys * self.values + values
        inputs = {
            "input_ids": torch.nn.functional.pad(facts, (0, 1), value=END),
            "decoder_input_ids": FIRST + keys.gather(1, asked),
            "labels": FIRST + self.keys + values.gather(1, asked),
        }
        return Batch(inputs, torch.arange(self.facts + 1) == asked[..., None])

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        return self.rows(size, generator).inputs

    def test(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(TEST_SEED)
        for start in range(0, self.test_rows, 250):
            yield self.rows(min(250, self.test_rows - start), generator)
