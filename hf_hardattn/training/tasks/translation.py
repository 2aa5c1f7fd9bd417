"""Translation of Debian's package descriptions from English."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, T5ForConditionalGeneration

from . import Batch, Recipe
from ._texts import Texts

PAD = 0
LONGEST = 40  # most tokens of a training sentence: the few longer ones would set the length of their whole batch


class Translation(Texts):
    """Translate sentences by greedy ``generate()``; BLEU and chrF in [0, 100]. The gold positions are unknown.

    Args:
        folder: ``train.jsonl``, ``test.jsonl``, ``validation.jsonl`` and ``tokenizer.json`` of ``scripts/data/prepare_translation.py``; by
            default the environment variable ``TRANSLATION_DATA``, or ``outputs/data/translation-it``.
        split: the split to test on. Tune on ``validation``.
    """

    place = "outputs/data/translation-it"
    variable = "TRANSLATION_DATA"
    maker = "python scripts/data/prepare_translation.py --language it"
    model_class = T5ForConditionalGeneration
    site = "decoder.cross.*"
    scorer = "attention"  # after a soft base checkpoint its first selections are already meaningful
    budget = 0.25
    recipe = Recipe(
        trunk_steps=4000, branch_steps=200, batch=32, learning_rate=3e-3, weight_decay=0.01, trunk_warmup=200
    )

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(
            "t5",
            vocab_size=self.tokenizer.get_vocab_size(),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_decoder_layers=1,  # one cross-attention: no other layer can read the positions that it drops
            num_heads=4,
            dropout_rate=0.0,  # a short training sees each pair only a few times
            tie_word_embeddings=False,  # tied embeddings learn much more slowly
            initializer_factor=0.1,  # initial scale of the output weights: at 1, the first logits have a spread of 11
            decoder_start_token_id=PAD,
        )

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        pairs = self._pairs("train")
        # a random stretch of a sorted random sample: sentences of similar length, so little of the batch is padding
        sample = torch.randint(len(pairs), (8 * size,), generator=generator).tolist()
        sample.sort(key=lambda index: len(pairs[index].source) + len(pairs[index].target))
        start = size * int(torch.randint(8, (), generator=generator))
        return _collate([pairs[index] for index in sample[start : start + size]])

    def test(self) -> Iterator[Batch]:
        pairs = sorted(self._pairs(self.split), key=lambda pair: len(pair.source))
        for start in range(0, len(pairs), 50):
            yield Batch(_collate(pairs[start : start + 50]))

    def predict(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[str]:
        sources: Any = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return self.texts(model.generate(**sources, do_sample=False, num_beams=1, max_new_tokens=64))  # type: ignore[operator]

    def _pairs(self, split: str) -> list[Pair]:
        return read_pairs(self.file(f"{split}.jsonl"), self.tokenizer, LONGEST if split == "train" else None)


@dataclass(frozen=True)
class Pair:
    """The token ids of a sentence and its translation, each with ``</s>``."""

    source: list[int]
    target: list[int]


@cache
def read_pairs(path: str, tokenizer: Tokenizer, longest: int | None) -> list[Pair]:
    """Read and tokenize a split; return the pairs of at most ``longest`` tokens, or all if it is None."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    sides = ([row[side] for row in rows] for side in ("source", "target"))
    sources, targets = (tokenizer.encode_batch(texts) for texts in sides)
    pairs = [Pair(source.ids, target.ids) for source, target in zip(sources, targets, strict=True)]
    return [pair for pair in pairs if longest is None or max(len(pair.source), len(pair.target)) <= longest]


def _collate(pairs: list[Pair]) -> dict[str, Tensor]:
    sources = pad_sequence([torch.tensor(pair.source) for pair in pairs], batch_first=True, padding_value=PAD)
    targets = pad_sequence([torch.tensor(pair.target) for pair in pairs], batch_first=True, padding_value=-100)
    return {"input_ids": sources, "attention_mask": (sources != PAD).long(), "labels": targets}
