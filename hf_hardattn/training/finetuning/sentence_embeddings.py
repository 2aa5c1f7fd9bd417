"""Embed texts for search with BERT and its successors: the hard model learns the original model's embeddings of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import ModelOutput

from ...errors import HardAttentionError
from ...functional.pooling import mean_rows
from ...modeling.hooks import end_behind_later_hooks
from ...recording import selectors
from ..arguments import flag
from ..loop import Task
from ..rows import text
from ..sharding import without_peft
from ..sources import column
from . import TaskArguments, freeze
from ._encoders import EncoderTask


@dataclass
class EmbeddingOutput(ModelOutput):
    """Unit vectors ``[B, D]`` and, in training, their distance from those of the teacher as ``loss``."""

    loss: Tensor | None = None
    embeddings: Tensor | None = None


class Embedder:
    """Make an encoder return the mean of its rows as the embedding, and the distance from the teacher's embedding as the loss.

    This uses hooks instead of a new class: the model stays a stock model, and so does what it saves, whole or as an adapter.

    Args:
        model: the encoder. teacher: the original model.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module):
        self.teacher = teacher.eval().requires_grad_(False)
        model.register_forward_pre_hook(self.without_queries, with_kwargs=True)
        # after the hooks of the sites, which restore rows, and before the end of the call, where estimators add to the loss
        model.register_forward_hook(self.embed, with_kwargs=True)
        end_behind_later_hooks(model)

    @staticmethod
    def without_queries(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Remove the inputs that only evaluation reads."""
        return args, {name: value for name, value in kwargs.items() if not name.startswith("query_")}

    def embed(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> EmbeddingOutput:
        """Return the embeddings of texts and, in training, one minus their cosine similarity to the teacher's."""
        embeddings = normalize(mean_rows(output.last_hidden_state, kwargs["attention_mask"]), dim=-1)
        if not model.training:
            return EmbeddingOutput(embeddings=embeddings)
        wanted = self.teach(kwargs["input_ids"], kwargs["attention_mask"])
        return EmbeddingOutput(loss=(1 - (embeddings * wanted).sum(-1)).mean(), embeddings=embeddings)

    @torch.no_grad()
    def teach(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the embeddings of the original model."""
        teacher = self.teacher.to(input_ids.device)
        hidden = teacher(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return normalize(mean_rows(hidden, attention_mask), dim=-1)


@dataclass(kw_only=True)
class EmbeddingArguments(TaskArguments):
    """Flags of sentence embeddings."""

    output_dir: str = flag("outputs/embeddings", "Directory for the model, results.json, log.jsonl and checkpoints.")
    text_column: str | None = flag(None, "Column of texts: text, document or sentence by default.")
    query_column: str | None = flag(
        None, "Column of queries that should find the text of their row: used only in evaluation."
    )
    max_source_length: int = flag(256, "Maximum number of tokens of a text; longer texts are truncated.")


class SentenceEmbeddings(EncoderTask):
    """A text column and, for evaluation, a column of queries; no labels."""

    model_class = AutoModel
    classes = MODEL_MAPPING_NAMES
    Arguments = EmbeddingArguments

    def columns(self, data: Dataset) -> None:
        self.text = column(data, self.args.text_column, ("text", "document", "sentence"), "--text_column")
        self.query = None
        if self.args.query_column is not None:
            self.query = column(data, self.args.query_column, (), "--query_column")

    def setup(self) -> Task:
        task = super().setup()
        refuse_further_passes(without_peft(task.model))
        name = self.args.model_name_or_path
        if name is None:
            raise HardAttentionError(
                "sentence_embeddings learns from the embeddings of a trained model, and --config_name provides none. Pass --model_name_or_path."
            )
        revision, cache = self.args.model_revision, self.args.cache_dir
        teacher = AutoModel.from_pretrained(name, revision=revision, cache_dir=cache, hard_attention=None)
        self.embedder = Embedder(without_peft(task.model), teacher)
        if any(".pooler." in f".{name}" for name, _ in task.model.named_parameters()):
            freeze(task.model, ["pooler"])  # its output is not used
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
        teach = self.embedder.teach
        embeddings = model(**batch).embeddings.float()
        whole = teach(batch["input_ids"], batch["attention_mask"]).float()
        losses = 1 - (embeddings * whole).sum(-1)
        wanted = whole if self.query is None else teach(batch["query_ids"], batch["query_mask"]).float()
        return list(embeddings.cpu()), list(wanted.cpu()), losses.tolist()

    def score(self, predictions: Sequence[Tensor], references: Sequence[Tensor]) -> dict[str, float]:
        documents, queries = torch.stack(list(predictions)), torch.stack(list(references))
        if self.query is None:
            return {"cosine": float((documents * queries).sum(-1).mean())}
        return search(queries, documents)


def refuse_further_passes(model: nn.Module) -> None:
    """Refuse estimators and options that run further forward passes, because those do not go through ``Embedder``.

    Raises:
        HardAttentionError: an estimator with several passes, one that needs a soft pass or a greedy one, or self-distillation.
    """
    for site, selector in selectors(model).items():
        greedy = selector.baseline is not None and selector.baseline.needs_greedy
        if greedy or {"passes", "choices", "teacher"} & set(selector.estimator.needs):
            raise HardAttentionError(
                f"the estimator or baseline at '{site}' needs several forward passes per step; sentence_embeddings computes its loss from a single one. "
                "Use 'simple', another estimator with gates, or 'reinforce' with baseline 'moving_average'."
            )
    if (getattr(model.config, "hard_attention", None) or {}).get("self_distillation"):
        raise HardAttentionError(
            "self_distillation needs an additional forward pass; sentence_embeddings already learns from the original model's embeddings. Leave it out."
        )


def search(queries: Tensor, documents: Tensor) -> dict[str, float]:
    """Recall@1, recall@10 and nDCG@10, in per cent, for unit vectors ``[M, D]``, where document i answers query i."""
    scores = queries @ documents.T
    rank = (scores > scores.diagonal().unsqueeze(1)).sum(1)
    gain = torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0)
    return {
        "recall@1": 100 * float((rank < 1).float().mean()),
        "recall@10": 100 * float((rank < 10).float().mean()),
        "ndcg@10": 100 * float(gain.mean()),
    }
