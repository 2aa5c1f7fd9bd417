"""Shared code of image-text and video-text retrieval: a model with contrastive and matching loss, and recall after re-ranking."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from ...modes import evaluating
from ..arguments import flag
from ..rows import text
from ..sources import column
from ._blip import BlipArguments, BlipTask

TEMPERATURE = 0.07
RANKS = (1, 5, 10)


class BlipForImageTextRetrieval(transformers.BlipForImageTextRetrieval):
    """The stock class with the training loss that Transformers leaves out: contrastive plus matching with hard negatives.

    Source: Li et al., BLIP, 2022, section 3.2, without momentum encoders; negatives come from the batch of one device.
    """

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        use_itm_head: bool = True,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Equal to the stock forward without ``labels``. With them (int64 ``[B]``, equal for equal texts) the output has a ``loss``."""
        if labels is None:
            return super().forward(input_ids, pixel_values, use_itm_head, attention_mask, **kwargs)
        output = super().forward(input_ids, pixel_values, True, attention_mask, **kwargs)
        tokens = output.last_hidden_state
        images, texts = self.embed_images(tokens), self.embed_texts(input_ids, attention_mask, **kwargs)
        logits, same = images @ texts.t() / TEMPERATURE, labels[:, None] == labels[None, :]
        targets = same / same.sum(1, keepdim=True)
        contrast = (cross_entropy(logits, targets) + cross_entropy(logits.t(), targets.t())) / 2
        matching = cross_entropy(output.itm_score, torch.ones_like(labels))
        if not same.all():
            with torch.no_grad():  # wrong pairs are drawn with the probability that the embeddings give them
                weights = (
                    logits.softmax(1).masked_fill(same, 0) + 1e-6 * ~same,
                    logits.t().softmax(1).masked_fill(same, 0) + 1e-6 * ~same,
                )
                rows = (~same).any(1)
                wrong_text, wrong_image = (torch.multinomial(w[rows], 1)[:, 0] for w in weights)
            zeros = torch.zeros_like(labels[rows])
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            for ids, seen, image in (
                (input_ids[wrong_text], mask[wrong_text], tokens[rows]),
                (input_ids[rows], mask[rows], tokens[wrong_image]),
            ):
                matching = matching + cross_entropy(self.match(ids, seen, image, **kwargs), zeros)
        output["loss"] = contrast + matching / 3
        return output

    def embed_images(self, tokens: Tensor) -> Tensor:
        """Unit vectors ``[B, d]`` of the vision tower's output ``[B, N, D]``."""
        return normalize(self.vision_proj(tokens[:, 0]), dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Unit vectors ``[B, d]`` of texts, computed without images."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return normalize(self.text_proj(states[:, 0]), dim=-1)

    def match(self, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Logits ``[B, 2]`` of (no match, match) for texts that attend to the vision tower's output ``[B, N, D]``."""
        seen = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        states = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=seen,
            **kwargs,
        ).last_hidden_state
        logits: Tensor = self.itm_head(states[:, 0])
        return logits


@dataclass(kw_only=True)
class RetrievalArguments(BlipArguments):
    """Flags of retrieval."""

    caption_column: str | None = flag(None, "Column of texts: caption or text by default.")
    rerank: int = flag(16, "Candidates per query that the matching head reranks; 0 keeps the order of the embeddings.")


@dataclass
class Item:
    """An image and its text in the form that ranking needs: unit vectors ``[d]``, the tower's output ``[N, D]``, token ids."""

    image: Tensor
    words: Tensor
    tokens: Tensor
    ids: list[int]


class RetrievalTask(BlipTask):
    """Find the text of each image among all texts, and the image of each text among all images.

    Embeddings rank all candidates; the matching head, which reads image and text together, re-ranks the best ones. It does not read the
    patches that a hard vision tower drops, so re-ranking is cheaper as well.
    """

    model_class = BlipForImageTextRetrieval
    Arguments = RetrievalArguments
    heads = ("vision_proj", "text_proj", "itm_head")

    def columns(self, data: Dataset) -> None:
        super().columns(data)
        self.caption = column(data, self.args.caption_column, ("caption", "text"), "--caption_column")

    def check_row(self, row: dict[str, Any]) -> None:
        super().check_row(row)
        text(row, self.caption)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokenizer, special = self.processor.tokenizer, self.text_config
        first = special.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        captions = [text(row, self.caption) for row in rows]
        tokens, mask = self.pad([self.encode(caption, first, special.sep_token_id) for caption in captions])
        labels = torch.tensor([captions.index(caption) for caption in captions])
        return {"pixel_values": self.pixels(rows), "input_ids": tokens, "attention_mask": mask, "labels": labels}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[Item], list[str], list[float]]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        output = model(input_ids=ids, pixel_values=batch["pixel_values"], attention_mask=mask)
        inner: Any = self.accelerator.unwrap_model(model)
        images, words = inner.embed_images(output.last_hidden_state), inner.embed_texts(ids, mask)
        parts = zip(images.float().cpu(), words.float().cpu(), output.last_hidden_state.cpu(), ids, mask, strict=True)
        items = [Item(image, word, tokens, row[seen.bool()].tolist()) for image, word, tokens, row, seen in parts]
        losses = cross_entropy(output.itm_score.float(), torch.ones_like(ids[:, 0]), reduction="none")
        return items, self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True), losses.tolist()

    @torch.no_grad()
    def score(self, predictions: Sequence[Item], references: Sequence[str]) -> dict[str, float]:
        """Recall at 1, 5 and 10 in [0, 100] in both directions; every item with an equal text counts as correct."""
        texts = {words: i for i, words in reversed(list(enumerate(references)))}
        kind = torch.tensor([texts[words] for words in references])
        first = torch.tensor(sorted(texts.values()))  # one row for each different text
        similarity = (
            torch.stack([item.image for item in predictions])
            @ torch.stack([item.words for item in predictions])[first].t()
        )
        right = kind[:, None] == first[None, :]
        started = time.perf_counter()
        with evaluating(self.accelerator.unwrap_model(self.model)):
            better = self._again(similarity, predictions, [predictions[int(i)].ids for i in first])
        found = {f"embedding_{name}": value for name, value in _recalls(similarity, right).items()} | _recalls(
            better, right
        )
        return {**found, "reranking_seconds": time.perf_counter() - started}

    def _again(self, similarity: Tensor, items: Sequence[Item], texts: list[list[int]]) -> Tensor:
        """Add the matching head's log-odds to the embeddings' logits of the best pairs of each row and column, which rank above all others.

        The head was trained to tell true pairs from wrong ones drawn by these logits, so its log-odds correct them (Gutmann & Hyvarinen
        2012, noise-contrastive estimation).
        """
        count, model = self.args.rerank, self.accelerator.unwrap_model(self.model)
        if not count:
            return similarity
        chosen = torch.zeros_like(similarity, dtype=torch.bool)
        for dim in (0, 1):
            best = similarity.topk(min(count, similarity.shape[dim]), dim).indices
            chosen.scatter_(dim, best, True)
        pairs = chosen.nonzero()[self.accelerator.process_index :: self.accelerator.num_processes]
        device, scores = self.accelerator.device, []
        for part in pairs.split(64):
            ids, mask = self.pad([texts[int(t)] for _, t in part])
            tokens = nn.utils.rnn.pad_sequence([items[int(i)].tokens for i, _ in part], batch_first=True)
            logits = model.match(ids.to(device), mask.to(device), tokens.to(device)).float()
            scores.append((logits[:, 1] - logits[:, 0]).cpu())
        mine = [(pairs, torch.cat(scores) if scores else torch.zeros(0))]
        better = similarity / TEMPERATURE
        for places, values in gather_object(mine) if self.accelerator.num_processes > 1 else mine:
            better[places[:, 0], places[:, 1]] += 1e3 + values
        return better


def _recalls(scores: Tensor, right: Tensor) -> dict[str, float]:
    found = {}
    for name, table, answer in (("image_to_text", scores, right), ("text_to_image", scores.t(), right.t())):
        order = answer.gather(1, table.argsort(dim=1, descending=True, stable=True))
        for rank in RANKS:
            found[f"{name}_recall@{rank}"] = 100 * float(order[:, :rank].any(1).float().mean())
    return found
