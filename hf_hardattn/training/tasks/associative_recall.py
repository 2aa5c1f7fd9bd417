"""Associative recall: look up the values of queried keys in a row of facts."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Batch, Recipe
from ._drawn import END, FIRST, Drawn


class AssociativeRecall(Drawn):
    """Name the value that a row assigns to each queried key (MQAR). Gold: for each query the position of its fact.

    The encoder consists of embeddings only and passes the facts on; each query of the decoder selects one position to read, the classic
    hard attention. A fact, a key with its value, is one token here instead of two, and no layer mixes facts, so exactly one position
    holds an answer. The base checkpoint learns rows of one fact first, then longer ones: with 16 facts from the start it stays at chance.

    Args:
        facts: facts per row, with different keys. queries: queries per row, different keys of that row.
        keys, values: number of different keys and values. test_rows: size of the fixed test set.

    Source: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv:2312.04927, section 3.
    """

    site = "decoder.cross.0"
    scorer = "attention"
    budget = 0.03  # one of 17 positions
    sizes = {  # 500 tokens are learned one by one, which is fast with untied embeddings of a small scale
        "num_layers": 0,
        "num_heads": 1,
        "d_kv": 64,
        "tie_word_embeddings": False,
        "initializer_factor": 0.1,
    }
    recipe = Recipe(trunk_steps=3000, branch_steps=300, learning_rate=5e-3, weight_decay=0.0, trunk_warmup=1, ramp=0.7)

    def __init__(
        self, facts: int = 16, queries: int = 8, keys: int = 32, values: int = 16, test_rows: int = 500
    ) -> None:
        self.facts, self.queries, self.keys, self.values, self.test_rows = facts, queries, keys, values, test_rows

    @property
    def vocabulary(self) -> int:
        return FIRST + self.keys + self.values + self.keys * self.values

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        facts = 1 + int((self.facts - 1) * max(0.0, difficulty - 0.4) / 0.6)
        return self._with(facts).rows(size, generator).inputs

    def rows(self, size: int, generator: torch.Generator) -> Batch:
        keys = torch.rand(size, self.keys, generator=generator).argsort(-1)[:, : self.facts]
        values = torch.randint(self.values, (size, self.facts), generator=generator)
        queried = torch.rand(size, self.facts, generator=generator).argsort(-1)[:, : self.queries]
        facts = FIRST + self.keys + self.values + keys * self.values + values
        inputs = {
            "input_ids": torch.nn.functional.pad(facts, (0, 1), value=END),
            "decoder_input_ids": FIRST + keys.gather(1, queried),
            "labels": FIRST + self.keys + values.gather(1, queried),
        }
        return Batch(inputs, torch.arange(self.facts + 1) == queried[..., None])

    def _with(self, facts: int) -> AssociativeRecall:
        return AssociativeRecall(facts, min(facts, self.queries), self.keys, self.values, self.test_rows)
