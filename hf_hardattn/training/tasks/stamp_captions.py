"""Captions of stamps by a recurrent decoder that attends to the image at each word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from ...backbones.gru import GruConfig, GruForConditionalGeneration
from . import Batch, Recipe
from ._texts import Texts


class StampCaptions(Texts):
    """Caption drawings and photos by greedy ``generate()``; BLEU-4 and chrF in [0, 100]. The patch features come from a frozen ViT, and a
    GRU decoder reads one of them, or all, at each word: the setting of Show, Attend and Tell, without input feeding. The gold positions
    are unknown.

    Args:
        folder: output of ``scripts/data/prepare_stamp_features.py``; by default the environment variable ``STAMP_FEATURES``, or
            ``outputs/data/stamp-features``.
        split: the split to test on. Tune on ``validation``.

    Source: Xu et al. 2015, arXiv:1502.03044.
    """

    place = "outputs/data/stamp-features"
    variable = "STAMP_FEATURES"
    maker = "python scripts/data/prepare_stamp_features.py"
    model_class = GruForConditionalGeneration
    site = "decoder.cross.0"
    scorer = "attention"  # after a soft base checkpoint its first selections are already meaningful
    budget = 0.005  # one patch
    recipe = Recipe(trunk_steps=800, branch_steps=200, batch=32, learning_rate=2e-3, weight_decay=0.01)

    def config(self) -> PreTrainedConfig:
        states, _ = self._stamps("train")
        size = self.tokenizer.get_vocab_size()
        return GruConfig(vocab_size=size, d_model=128, num_layers=0, feature_size=states.shape[-1], dropout=0.3)

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        states, captions = self._stamps("train")
        return _collate(states, captions, torch.randint(len(captions), (size,), generator=generator))

    def test(self) -> Iterator[Batch]:
        states, captions = self._stamps(self.split)
        for rows in torch.arange(len(captions)).split(50):
            yield Batch(_collate(states, captions, rows))

    def predict(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[str]:
        decode: Any = model.generate
        return self.texts(decode(inputs_embeds=inputs["inputs_embeds"], do_sample=False, max_new_tokens=24))

    def _stamps(self, split: str) -> tuple[Tensor, list[Tensor]]:
        return read_stamps(self.file(f"{split}.safetensors"), self.file(f"{split}.jsonl"), self.tokenizer)


@cache
def read_stamps(states: str, captions: str, tokenizer: Tokenizer) -> tuple[Tensor, list[Tensor]]:
    """Return the features ``[n, patches, D]`` of a split and the tokens of its captions, each with ``</s>``."""
    rows = [json.loads(line)["caption"] for line in Path(captions).read_text("utf-8").splitlines()]
    return load_file(states)["features"], [torch.tensor(found.ids) for found in tokenizer.encode_batch(rows)]


def _collate(states: Tensor, captions: list[Tensor], rows: Tensor) -> dict[str, Tensor]:
    labels = pad_sequence([captions[row] for row in rows.tolist()], batch_first=True, padding_value=-100)
    return {"inputs_embeds": states[rows].float(), "labels": labels}
