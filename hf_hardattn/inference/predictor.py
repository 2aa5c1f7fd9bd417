"""From a batch of inputs to rows of an output table: classes, texts or embeddings, and the positions that the model kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import HardAttentionError, shown, unknown
from ..functional.pooling import mean_rows
from ..inspection.model_with_processor import ModelWithProcessor
from ..inspection.perturbation import choosable
from ..modeling.heads import class_scores
from ..recording import Recording, record

POOLINGS = ("mean", "cls")


@dataclass
class Predictor:
    """Predicts rows: the prediction of the model's head, and the positions of the input that were kept.

    Attributes:
        model: the model with its processor. pooling: for a model without a head, ``"mean"`` of the rows that are left, or ``"cls"``.
        max_new_tokens: for a model that generates text, >= 1.
    """

    model: ModelWithProcessor
    pooling: str = "mean"
    max_new_tokens: int = 40

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS)

    def check(self, inputs: Sequence[Any], first: int = 0) -> None:
        """Raise for an input that cannot be predicted; ``first`` is the row of the first input in the collection, from 0.

        Raises:
            HardAttentionError: an input is not an image, or not a text with a character in it.
        """
        for row, value in enumerate(inputs, first):
            fits = hasattr(value, "convert") if self.model.takes_images else isinstance(value, str)
            if not fits:
                wanted = "an image" if self.model.takes_images else "a text"
                raise HardAttentionError(
                    f"row {row} (the first is 0) is {shown(value)}; {self.model.name} reads {wanted} in every row. Name another column, or "
                    "leave the row out."
                )
            if not self.model.takes_images and not value.strip():
                raise HardAttentionError(
                    f"row {row} (the first is 0) is an empty text; there is nothing to predict. Leave it out."
                )

    def lengths(self, inputs: Sequence[Any]) -> list[int]:
        """Return the number of tokens of each text, or 0 for each image, since images are all of the same length."""
        if self.model.takes_images:
            return [0] * len(inputs)
        if self.model.processor is None:
            raise HardAttentionError(
                f"{self.model.name} holds no tokenizer, which texts need; save it next to the model."
            )
        return [len(ids) for ids in self.model.processor(list(inputs), truncation=True)["input_ids"]]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Any]) -> dict[str, list[Any]]:
        """Predict a batch.

        Returns:
            Columns of B entries: ``label`` and ``score`` (of the likeliest class, as Transformers' pipelines compute it; the number itself
            for a regression), or ``text``, or ``embedding``. A hard model adds ``kept`` (positions of the
            input without padding that are left at its last site, ascending) and ``kept_share`` (their share of the positions it could have kept).
        """
        model = self.model.model
        batch = {name: value.to(model.device) for name, value in self.model.encode(inputs).items()}
        with record(model) if self.model.hard else nullcontext(Recording()) as recording:
            columns = self._text(batch) if model.can_generate() else self._head(model(**batch), batch)
        return columns | self._kept(batch, recording)

    def _text(self, batch: dict[str, Tensor]) -> dict[str, list[Any]]:
        model: Any = self.model.model
        written = model.generate(
            **batch, max_new_tokens=self.max_new_tokens, max_length=None, num_beams=1, do_sample=False
        )
        if not model.config.is_encoder_decoder and "input_ids" in batch:
            written = written[:, batch["input_ids"].shape[1] :]  # a decoder repeats its prompt
        return {"text": self.model.tokenizer.batch_decode(written, skip_special_tokens=True)}

    def _head(self, output: Any, batch: dict[str, Tensor]) -> dict[str, list[Any]]:
        if output.get("logits") is not None and output.logits.dim() == 2:
            best = class_scores(self.model.model.config, output.logits).max(-1)
            names = self.model.model.config.id2label
            return {"label": [str(names[i]) for i in best.indices.tolist()], "score": best.values.tolist()}
        hidden = output.get("last_hidden_state")
        if hidden is None:
            raise HardAttentionError(
                f"{type(self.model.model).__name__} does not classify, generate text or return last_hidden_state; predict needs a model "
                "that does one of these."
            )
        pooled = hidden[:, 0] if self.pooling == "cls" else mean_rows(hidden, batch.get("attention_mask"))
        return {"embedding": list(pooled.float().cpu().numpy())}

    def _kept(self, batch: dict[str, Tensor], recording: Recording) -> dict[str, list[Any]]:
        if not recording:
            return {}
        tower, free, _ = choosable(self.model.model, batch)
        sites = [s for s in recording.sites if recording.tower(s) == tower and s.split(".")[1] in ("inputs", "tokens")]
        if not sites:
            return {}
        kept = recording.kept(recording[sites[-1]][0]).flatten(1, 2).any(1).expand_as(free)
        share = (kept & free).sum(1) / free.sum(1).clamp(min=1)
        # A row's positions are its own: a decoder is padded on the left, by as much as the longest row of the batch demands.
        mask = batch.get("attention_mask")
        first = torch.zeros(len(kept), dtype=torch.long, device=kept.device) if mask is None else mask.argmax(1)
        places = [(row.nonzero().flatten() - start).tolist() for row, start in zip(kept, first, strict=True)]
        return {"kept": places, "kept_share": share.tolist()}
