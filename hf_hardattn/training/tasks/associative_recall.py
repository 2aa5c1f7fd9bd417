"""A row of facts, then keys: which values?"""

from __future__ import annotations

import torch

from . import Batch, Recipe
from ._drawn import END, FIRST, Drawn


class AssociativeRecall(Drawn):
    """Say the value that a row gives to each queried key (MQAR). Gold: for each query the position of its fact.

    The encoder reads the facts, the decoder the queries, each of which chooses one position to read: the classic hard attention. A
    fact, a key with its value, is one token here and not two, so that exactly one position holds an answer.

    Args:
        facts: of a row, with different keys. queries: of a row, different keys of it. keys, values: how many there are.
        test_rows: of the fixed test set.

    Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv:2312.04927, section 3.
    """

    site = "decoder.cross.0"
    scorer = "query_key"
    budget = 0.03  # of 17 positions: one
    recipe = Recipe(trunk_steps=1000, branch_steps=400, batch=32)

    def __init__(
        self, facts: int = 16, queries: int = 8, keys: int = 32, values: int = 16, test_rows: int = 500
    ) -> None:
        self.facts, self.queries, self.keys, self.values, self.test_rows = facts, queries, keys, values, test_rows

    @property
    def vocabulary(self) -> int:
        return FIRST + self.keys + self.values + self.keys * self.values

    def rows(self, size: int, generator: torch.Generator) -> Batch:
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
