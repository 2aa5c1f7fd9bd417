"""Generate the completion of a prompt with a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ... import models
from ...errors import HardAttentionError
from ..arguments import flag
from ..metrics import score_texts
from ..rows import text
from ..sources import column
from . import Base, TaskArguments
from ._texts import mean_loss


@dataclass(kw_only=True)
class CausalArguments(TaskArguments):
    """Flags of causal language modelling."""

    output_dir: str = flag("outputs/decoder", "Directory for the model, results.json, log.jsonl and checkpoints.")
    prompt_column: str | None = flag(None, "Column of prompts: prompt, source or question by default.")
    completion_column: str | None = flag(None, "Column of completions: completion, target or answer by default.")
    max_prompt_length: int = flag(1024, "Maximum number of tokens of a prompt; only the end of longer prompts is kept.")
    max_target_length: int = flag(128, "Maximum number of tokens of a completion; longer completions are truncated.")
    num_beams: int = flag(1, "Beams in evaluation.")
    metrics: list[str] = flag(["answers"], "answers (exact match and word F1) | rouge | bleu (with chrF) | cider")


class CausalLanguageModelling(Base):
    """A prompt column and a completion column; only the completion has labels, so sites select among the tokens of the prompt."""

    families = ("decoder",)
    first = "decoder"
    model_class = AutoModelForCausalLM
    Arguments = CausalArguments
    processor_class = AutoTokenizer
    adapters = ("q_proj", "v_proj")

    def __init__(self, args: Any, accelerator: Accelerator) -> None:
        super().__init__(args, accelerator)
        name = args.config_name or args.model_name_or_path
        if name is None:
            return  # setup() reports the missing name
        config = AutoConfig.from_pretrained(name, revision=args.model_revision, cache_dir=args.cache_dir)
        if config.model_type not in decoders():
            raise HardAttentionError(
                f"{name} is a {config.model_type!r} model; causal_lm trains decoders: {', '.join(decoders())}. Use the command of its family."
            )
        # replaces the Auto class, which cannot build a model from scratch
        self.__dict__["model_class"] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def columns(self, data: Dataset) -> None:
        args = self.args
        self.prompt = column(data, args.prompt_column, ("prompt", "source", "question"), "--prompt_column")
        self.completion = column(
            data, args.completion_column, ("completion", "target", "answer"), "--completion_column"
        )
        score_texts(args.metrics, ["a"], ["a"])  # a missing package raises now, not after the training

    def build(self, config: PreTrainedConfig, processor: Any) -> None:
        super().build(config, processor)
        if len(processor) > config.vocab_size or processor.eos_token_id is None:
            raise HardAttentionError(
                f"the tokenizer has {len(processor)} tokens, the model {config.vocab_size}, and the end of a text is token "
                f"{processor.eos_token_id}; they do not match. Pass the model's own tokenizer as --processor_name."
            )
        self.padding = processor.eos_token_id if processor.pad_token_id is None else processor.pad_token_id

    def check_row(self, row: dict[str, Any]) -> None:
        text(row, self.prompt), text(row, self.completion)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts, completions = [], []
        for row in rows:
            ids = self.processor(text(row, self.prompt))["input_ids"]
            ids = (
                ids[:-1] if ids and ids[-1] == self.processor.eos_token_id else ids
            )  # the completion continues from here
            prompts.append(ids[-self.args.max_prompt_length :])
            ids = self.processor(text(row, self.completion), add_special_tokens=False)["input_ids"]
            completions.append([*ids[: self.args.max_target_length - 1], self.processor.eos_token_id])
        pairs = list(zip(prompts, completions, strict=True))
        return {
            **self.padded([prompt + completion for prompt, completion in pairs]),
            "labels": left([[-100] * len(prompt) + completion for prompt, completion in pairs], -100),
        }

    def padded(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Pad token ids on the left; return ``input_ids`` and ``attention_mask``."""
        return {"input_ids": left(rows, self.padding), "attention_mask": left([[1] * len(row) for row in rows], 0)}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[list[str], list[str], list[float]]:
        labels = batch["labels"][:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        is_prompt = batch["attention_mask"].bool() & (batch["labels"] == -100)
        prompts = self.padded([ids[own].tolist() for ids, own in zip(batch["input_ids"], is_prompt, strict=True)])
        written = self.accelerator.unwrap_model(model).generate(
            **{name: value.to(labels.device) for name, value in prompts.items()},
            num_beams=self.args.num_beams,
            max_new_tokens=self.args.max_target_length,
            max_length=None,  # the checkpoint's max_length would cause a warning at each call
            pad_token_id=self.padding,
        )
        known = batch["labels"].masked_fill(batch["labels"] == -100, self.padding)
        pairs = (written[:, prompts["input_ids"].shape[1] :], known)
        predictions, references = (self.processor.batch_decode(ids, skip_special_tokens=True) for ids in pairs)
        return predictions, references, mean_loss(losses, labels)

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return score_texts(self.args.metrics, predictions, references)


def decoders() -> tuple[str, ...]:
    """Return the model types that continue a text prompt."""
    specs = {name: models.load(name).spec for name in models.names()}
    return tuple(name for name, spec in specs.items() if any(t.prompt for t in spec.towers) and not spec.candidates)


def left(rows: list[list[int]], value: int) -> Tensor:
    """Pad lists of numbers on the left to one int64 tensor ``[B, T]``."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])
