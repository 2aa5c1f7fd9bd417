"""Embed texts for search with BERT and its successors: the hard model learns the embeddings that the original makes of whole texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import ModelOutput

from ...errors import HardAttentionError
from ...functional.pooling import mean_rows
from ..arguments import flag
from ..loop import Task
from ..rows import text
from ..sharding import without_peft
from ..sources import column
from . import TaskArguments, freeze
from ._encoders import EncoderTask


@dataclass
class EmbeddingOutput(ModelOutput):
    """Unit vectors ``[B, D]``, and in training how far they are from the teacher's."""

    loss: Tensor | None = None
    embeddings: Tensor | None = None


class Embedder:
    """An encoder with the mean of its rows as the embedding; the loss is one minus the cosine to the teacher's.

    Class attributes:
        base: class of the encoder.

    Attributes:
        teacher: a tuple of the original model, which is no part of this one; empty until there is one.
    """

    base: Any
    base_model_prefix: str
    base_model: nn.Module

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        setattr(self, self.base_model_prefix, self.base(config))
        self.teacher: tuple[nn.Module, ...] = ()
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        query_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> EmbeddingOutput:
        """Embed texts; queries, which only an evaluation reads, are left alone."""
        hidden = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        embeddings = normalize(mean_rows(hidden, attention_mask), dim=-1)
        if not self.teacher:
            return EmbeddingOutput(embeddings=embeddings)
        loss = (1 - (embeddings * self.teach(input_ids, attention_mask)).sum(-1)).mean()
        return EmbeddingOutput(loss=loss, embeddings=embeddings)

    @torch.no_grad()
    def teach(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The original model's embeddings."""
        teacher = self.teacher[0].to(input_ids.device)
        hidden = teacher(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return normalize(mean_rows(hidden, attention_mask), dim=-1)


@functools.cache
def embedder(base: Any) -> Any:
    """The embedder of an encoder's class; it has that class's name, by which what it saves is loaded."""
    start = next(cls for cls in base.__mro__ if cls.__name__.endswith("PreTrainedModel"))
    return type(base.__name__, (Embedder, start), {"base": base, "__module__": __name__})


@dataclass(kw_only=True)
class EmbeddingArguments(TaskArguments):
    """Flags of sentence embeddings."""

    output_dir: str = flag("outputs/embeddings", "Where the model, results.json, log.jsonl and checkpoints go.")
    text_column: str | None = flag(None, "Column of texts: text, document, sentence by default.")
    query_column: str | None = flag(
        None, "Column of queries that find the text of their row: only evaluation reads it."
    )
    max_source_length: int = flag(256, "Tokens of a text, at most; longer ones are cut.")


class SentenceEmbeddings(EncoderTask):
    """A text column, and for evaluation a column of queries; no labels."""

    model_class = AutoModel
    classes = MODEL_MAPPING
    Arguments = EmbeddingArguments

    def class_of(self, stock: Any) -> Any:
        return embedder(stock)

    def columns(self, data: Dataset) -> None:
        self.text = column(data, self.args.text_column, ("text", "document", "sentence"), "--text_column")
        self.query = None
        if self.args.query_column is not None:
            self.query = column(data, self.args.query_column, (), "--query_column")

    def setup(self) -> Task:
        task = super().setup()
        name = self.args.model_name_or_path
        if name is None:
            raise HardAttentionError(
                "sentence_embeddings learns from the embeddings of a trained model, and --config_name brings none. Give --model_name_or_path."
            )
        revision, cache = self.args.model_revision, self.args.cache_dir
        teacher = AutoModel.from_pretrained(name, revision=revision, cache_dir=cache, hard_attention=None)
        student: Any = without_peft(task.model)
        student.teacher = (teacher.eval().requires_grad_(False),)
        if any(".pooler." in f".{name}" for name, _ in task.model.named_parameters()):
            freeze(task.model, ["pooler"])  # nothing reads it
        return task

    def check_row(self, row: dict[str, Any]) -> None:
        text(row, self.text)
        if self.query is not None:
            text(row, self.query)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.pad([self.encode(text(row, self.text), self.args.max_source_length) for row in rows])
        if self.query is None:
            return batch
        queries = self.pad([self.encode(text(row, self.query), self.args.max_source_length) for row in rows])
        return {**batch, "query_ids": queries["input_ids"], "query_mask": queries["attention_mask"]}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[float]]:
        inner: Any = without_peft(self.accelerator.unwrap_model(model))
        embeddings = model(**batch).embeddings.float()
        whole = inner.teach(batch["input_ids"], batch["attention_mask"]).float()
        losses = 1 - (embeddings * whole).sum(-1)
        wanted = whole if self.query is None else inner.teach(batch["query_ids"], batch["query_mask"]).float()
        return list(embeddings.cpu()), list(wanted.cpu()), losses.tolist()

    def score(self, predictions: Sequence[Tensor], references: Sequence[Tensor]) -> dict[str, float]:
        documents, queries = torch.stack(list(predictions)), torch.stack(list(references))
        if self.query is None:
            return {"cosine": float((documents * queries).sum(-1).mean())}
        return search(queries, documents)


def search(queries: Tensor, documents: Tensor) -> dict[str, float]:
    """Recall@1, recall@10 and nDCG@10, in per cent, of unit vectors ``[M, D]`` where document i answers query i."""
    scores = queries @ documents.T
    rank = (scores > scores.diagonal().unsqueeze(1)).sum(1)
    gain = torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0)
    return {
        "recall@1": 100 * float((rank < 1).float().mean()),
        "recall@10": 100 * float((rank < 10).float().mean()),
        "ndcg@10": 100 * float(gain.mean()),
    }
