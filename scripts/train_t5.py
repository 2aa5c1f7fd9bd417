"""Train T5, hard or soft, to translate, summarise, or map any text to another.

    python scripts/train_t5.py --model_name_or_path google-t5/t5-small --train_file train.csv --validation_file val.csv \
        --source_column en --target_column fr --sites encoder.inputs --budget 0.5 --output_dir outputs/t5-hard
    python scripts/train_t5.py --config scripts/configs/t5.yaml --budget 0.3
    accelerate launch --num_processes 2 scripts/train_t5.py --config scripts/configs/t5.yaml      # two GPUs
    torchrun --nproc_per_node 2 scripts/train_t5.py --config scripts/configs/t5.yaml --cpu       # two CPU processes

Text comes from the Hub (--dataset_name) or from a csv or json file, as two columns or as one `translation` column of dicts by language
(--source_lang en --target_lang fr). Without --sites, --budget or --hard_attention the model trains soft, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoTokenizer, T5ForConditionalGeneration

from hf_hardattn.errors import HardAttentionError
from hf_hardattn.training.arguments import ScriptArguments, flag
from hf_hardattn.training.loop import Task, start, train
from hf_hardattn.training.metrics import score_texts
from hf_hardattn.training.models import load_config, load_model, processor_source
from hf_hardattn.training.parsing import parse, run
from hf_hardattn.training.sources import column, load_splits


@dataclass(kw_only=True)
class Arguments(ScriptArguments):
    """Flags of this script, besides the shared ones."""

    output_dir: str = flag("outputs/t5", "Where the model, results.json, log.jsonl and checkpoints go.")
    source_column: str | None = flag(None, "Column of the input: source, text, document, article by default.")
    target_column: str | None = flag(None, "Column of the output: target, summary, highlights by default.")
    source_lang: str | None = flag(None, "Key of the input in a `translation` column.")
    target_lang: str | None = flag(None, "Key of the output in a `translation` column.")
    source_prefix: str = flag("", "Put before each input, e.g. 'summarize: '.")
    max_source_length: int = flag(512, "Tokens of the input, at most.")
    max_target_length: int = flag(128, "Tokens of the output, at most.")
    num_beams: int = flag(1, "Beams in evaluation.")
    metrics: list[str] = flag(["bleu"], "bleu (with chrF) | rouge")


@dataclass
class Collate:
    """Rows to token ids; labels are padded with -100, which no loss counts."""

    tokenizer: Any
    args: Arguments
    source: str
    target: str
    multiple: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        args = self.args
        pairs = [row["translation"] if args.source_lang else row for row in rows]
        sources = [args.source_prefix + pair[self.source] for pair in pairs]
        targets = [pair[self.target] for pair in pairs]
        batch = self.encode(args.max_source_length, text=sources)
        labels = self.encode(args.max_target_length, text_target=targets)
        ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": ids}

    def encode(self, longest: int, **texts: list[str]) -> Any:
        rows = self.tokenizer(**texts, truncation=True, max_length=longest)
        return self.tokenizer.pad(rows, pad_to_multiple_of=self.multiple, return_tensors="pt")


def predict(
    model: nn.Module, batch: dict[str, Any], *, accelerator: Accelerator, tokenizer: Any, args: Arguments
) -> tuple[list[str], list[str], list[float]]:
    """The text generated from each input."""
    inner, labels = accelerator.unwrap_model(model), batch["labels"]
    logits = model(**batch).logits.float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    generated = inner.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        num_beams=args.num_beams,
        max_new_tokens=args.max_target_length,
    )
    references = labels.masked_fill(labels == -100, tokenizer.pad_token_id)
    texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (generated, references)]
    return *texts, (losses.sum(1) / (labels != -100).sum(1).clamp(min=1)).tolist()


def setup(args: Arguments, accelerator: Accelerator) -> Task:
    """Data, tokenizer and model."""
    training, validation = load_splits(args)
    data = validation if training is None else training
    if args.source_lang or args.target_lang:
        if not (args.source_lang and args.target_lang):
            raise HardAttentionError("one language is missing; --source_lang and --target_lang go together.")
        column(data, "translation", (), "--source_column and --target_column")
        source, target = args.source_lang, args.target_lang
    else:
        source = column(data, args.source_column, ("source", "text", "document", "article"), "--source_column")
        target = column(data, args.target_column, ("target", "summary", "highlights"), "--target_column")

    config = load_config(args, T5ForConditionalGeneration)
    tokenizer = AutoTokenizer.from_pretrained(processor_source(args))
    if len(tokenizer) > config.vocab_size:
        raise HardAttentionError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}; they do not belong together. "
            "Name the model's own tokenizer with --processor_name."
        )
    if args.use_peft and args.lora_target_modules is None:
        args.lora_target_modules = ["q", "v"]
    score_texts(args.metrics, ["a"], ["a"])  # fails now, not after the training, where a package is missing
    return Task(
        name="text-to-text",
        model=load_model(args, T5ForConditionalGeneration, config),
        processor=tokenizer,
        train=training,
        validation=validation,
        collate=Collate(tokenizer, args, source, target, None if accelerator.mixed_precision == "no" else 8),
        predict=partial(predict, accelerator=accelerator, tokenizer=tokenizer, args=args),
        score=partial(score_texts, args.metrics),
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(Arguments, argv)
    accelerator = start(args)
    return train(accelerator, args, setup(args, accelerator), argv)


if __name__ == "__main__":
    run(main)
