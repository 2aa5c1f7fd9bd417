"""String transduction with a known monotonic alignment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...backbones.gru import GruConfig, GruForConditionalGeneration
from ...modes import sampled
from . import TEST_SEED, Base, Batch, Recipe

PAD, END, FIRST = 0, 1, 2


class Transduction(Base):
    """Rewrite a word letter by letter: a fixed table maps each letter to zero to three letters, depending on the letter and on whether
    it repeats the previous one. The alignment is monotonic, hidden from the model, and known here. Gold: for each output letter the
    position of its source letter; the end token is aligned with the end token.

    The model is recurrent, and its decoder sees the word only through the positions that it reads.

    Args:
        letters: size of the alphabet. shortest, longest: letters of a word. test_words: size of the fixed test set.
        table: seed of the table.

    Source: the setting of Wu & Cotterell 2019, arXiv:1905.06319, with a made-up language whose alignment is known.
    """

    model_class = GruForConditionalGeneration
    site = "decoder.cross.0"
    scorer = "query_key"
    budget = 0.05  # one letter
    metric = "exact"
    samples = 8
    recipe = Recipe(trunk_steps=1500, branch_steps=700, batch=32, learning_rate=2e-3, weight_decay=0.0)

    def __init__(
        self, letters: int = 20, shortest: int = 5, longest: int = 12, test_words: int = 500, table: int = 0
    ) -> None:
        self.letters, self.shortest, self.longest, self.test_words = letters, shortest, longest, test_words
        draw = torch.Generator().manual_seed(table)
        self.lengths = torch.randint(0, 4, (2, letters), generator=draw)
        self.written = torch.randint(letters, (2, letters, 3), generator=draw)

    def config(self) -> PreTrainedConfig:
        return GruConfig(vocab_size=FIRST + self.letters, d_model=64, dropout=0.0)

    def rows(self, size: int, generator: torch.Generator) -> Batch:
        """Draw ``size`` words."""
        lengths = torch.randint(self.shortest, self.longest + 1, (size,), generator=generator).tolist()
        sources, targets, alignments = [], [], []
        for length in lengths:
            word = torch.randint(self.letters, (length,), generator=generator)
            repeat = torch.rand(length, generator=generator) < 0.2
            word = torch.where(repeat, word.roll(1), word)
            again = torch.cat((torch.zeros(1, dtype=torch.bool), word[1:] == word[:-1])).int()
            target: list[int] = []
            alignment: list[int] = []
            for place, (letter, rule) in enumerate(zip(word.tolist(), again.tolist(), strict=True)):
                count = int(self.lengths[rule, letter])
                target += self.written[rule, letter, :count].tolist()
                alignment += [place] * count
            sources.append([FIRST + letter for letter in word.tolist()] + [END])
            targets.append([FIRST + letter for letter in target] + [END])
            alignments.append([*alignment, length])
        ids, labels, aligned = _padded(sources, PAD), _padded(targets, -100), _padded(alignments, -1)
        inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}
        return Batch(inputs, aligned[..., None] == torch.arange(ids.shape[1]))

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        return self.rows(size, generator).inputs

    def test(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(TEST_SEED)
        for start in range(0, self.test_words, 100):
            yield self.rows(min(100, self.test_words - start), generator)

    def predict(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Any]:
        """Generate the words. The forward pass before it lets a recording hold the selections for the labels."""
        model(**inputs)
        return self._write(model, inputs)

    def predict_drawn(self, model: PreTrainedModel, inputs: dict[str, Tensor], samples: int) -> list[Any]:
        """Return the most frequent of ``samples`` words generated with drawn selections; the first one if there is a tie."""
        with sampled(model):
            drawn = [self._write(model, inputs) for _ in range(samples)]
        return [max(words, key=words.count) for words in zip(*drawn, strict=True)]

    def _write(self, model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        limit = inputs["labels"].shape[1] + 3
        return [_text(row) for row in model.generate(**given, do_sample=False, max_new_tokens=limit)[:, 1:].tolist()]

    def references(self, inputs: dict[str, Tensor]) -> list[Any]:
        return [_text(row) for row in inputs["labels"].tolist()]

    def score(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """``exact``: share of words without an error; ``edits``: edit distance divided by the number of letters."""
        pairs = list(zip(predictions, references, strict=True))
        edits = sum(_distance(one, other) for one, other in pairs)
        return {
            "exact": sum(one == other for one, other in pairs) / len(pairs),
            "edits": edits / max(sum(len(other) for _, other in pairs), 1),
        }


def _padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def _text(row: list[int]) -> list[int]:
    end = row.index(END) if END in row else len(row)
    return [letter for letter in row[:end] if letter >= FIRST]


def _distance(one: list[int], other: list[int]) -> int:
    """Levenshtein distance."""
    line = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, line[0] = line[0], i
        for j, b in enumerate(other, 1):
            last, line[j] = line[j], min(line[j] + 1, line[j - 1] + 1, last + (a != b))
    return line[-1]
