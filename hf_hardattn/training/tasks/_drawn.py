"""Shared code of the tasks on generated token rows: a small T5, and rows drawn with their gold positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, T5ForConditionalGeneration

from . import TEST_SEED, Base, Batch

PAD, END, FIRST = 0, 1, 2  # ids: padding (and decoder start), </s>, and the first ordinary token


class Drawn(Base):
    """A task whose rows come from a generator; a subclass provides ``rows``, ``vocabulary`` and ``test_rows``."""

    model_class = T5ForConditionalGeneration
    test_rows: int
    sizes: ClassVar[dict[str, Any]] = {}  # sizes of the T5 that differ from the defaults of config()

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    def rows(self, size: int, generator: torch.Generator) -> Batch:
        """Draw ``size`` rows with their gold positions."""
        raise NotImplementedError

    def config(self) -> PreTrainedConfig:
        sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_decoder_layers=1, num_heads=4, dropout_rate=0.0)
        return AutoConfig.for_model(
            "t5", vocab_size=self.vocabulary, decoder_start_token_id=PAD, **(sizes | self.sizes)
        )

    def draw(self, size: int, generator: torch.Generator, difficulty: float = 1.0) -> dict[str, Tensor]:
        return self.rows(size, generator).inputs

    def test(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(TEST_SEED)
        for start in range(0, self.test_rows, 250):
            yield self.rows(min(250, self.test_rows - start), generator)
