"""Captions of stamps by the recurrent decoder: at each word it looks at the picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
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
from ...errors import HardAttentionError
from ..metrics import bleu
from . import Base, Batch, Recipe

FOLDER = "outputs/data/stamp-features"  # what scripts/prepare_stamp_features.py writes
VARIABLE = "STAMP_FEATURES"


class StampCaptions(Base):
    """Caption drawings and photos by greedy ``generate()``; BLEU-4 and chrF in [0, 100]. The features of the patches are a frozen ViT's, and
    a GRU decoder reads one of them, or all, at each word: the setting of Show, Attend and Tell, without input feeding. Nobody knows the gold
    positions.

    Args:
        folder: of ``scripts/prepare_stamp_features.py``; the environment variable ``STAMP_FEATURES``, or ``FOLDER``, by default.
        split: to test on. Tune on ``validation``.

    Source: Xu et al. 2015, arXiv:1502.03044.
    """

    model_class = GruForConditionalGeneration
    site = "decoder.cross.0"
    scorer = "attention"  # from a soft trunk it starts with a choice that means something
    budget = 0.005  # one patch
    metric = "bleu"
    points = 1.0
    recipe = Recipe(trunk_steps=500, branch_steps=150, batch=32, learning_rate=2e-3, weight_decay=0.01)

    def __init__(self, folder: str | None = None, split: str = "test") -> None:
        self.folder, self.split = folder or os.environ.get(VARIABLE) or FOLDER, split

    def config(self) -> PreTrainedConfig:
        states, _ = read_stamps(self.folder, "train")
        size = read_tokenizer(self.folder).get_vocab_size()
        return GruConfig(vocab_size=size, d_model=128, num_layers=0, feature_size=states.shape[-1], dropout=0.3)

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        states, captions = read_stamps(self.folder, "train")
        return _collate(states, captions, torch.randint(len(captions), (size,), generator=generator))

    def test(self) -> Iterator[Batch]:
        states, captions = read_stamps(self.folder, self.split)
        for rows in torch.arange(len(captions)).split(50):
            yield Batch(_collate(states, captions, rows))

    def predict(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[str]:
        decode: Any = model.generate
        return self._texts(decode(inputs_embeds=inputs["inputs_embeds"], do_sample=False, max_new_tokens=24))

    def references(self, inputs: dict[str, Tensor]) -> list[str]:
        return self._texts(inputs["labels"].clamp(min=0))

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return bleu(predictions, references)

    def _texts(self, ids: Tensor) -> list[str]:
        return read_tokenizer(self.folder).decode_batch(ids.tolist(), skip_special_tokens=True)


@cache
def read_tokenizer(folder: str) -> Tokenizer:
    """Read ``tokenizer.json`` of ``folder``."""
    return Tokenizer.from_file(str(_existing(folder, "tokenizer.json")))


@cache
def read_stamps(folder: str, split: str) -> tuple[Tensor, list[Tensor]]:
    """Features ``[n, patches, D]`` of a split, and the tokens of its captions, each with ``</s>``."""
    states = load_file(_existing(folder, f"{split}.safetensors"))["features"]
    rows = [json.loads(line)["caption"] for line in _existing(folder, f"{split}.jsonl").read_text("utf-8").splitlines()]
    return states, [torch.tensor(found.ids) for found in read_tokenizer(folder).encode_batch(rows)]


def _existing(folder: str, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise HardAttentionError(
            f"{path} is not there; the task 'stamp_captions' reads what a script makes. Make it with: "
            f"python scripts/prepare_stamp_features.py --output {folder}; or name its folder in ${VARIABLE}."
        )
    return path


def _collate(states: Tensor, captions: list[Tensor], rows: Tensor) -> dict[str, Tensor]:
    labels = pad_sequence([captions[row] for row in rows.tolist()], batch_first=True, padding_value=-100)
    return {"inputs_embeds": states[rows].float(), "labels": labels}
