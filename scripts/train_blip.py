"""Train BLIP, hard or soft, to caption images.

    python scripts/train_blip.py --model_name_or_path Salesforce/blip-image-captioning-base --train_dir photos/train \
        --validation_dir photos/val --sites vision.tokens.3 vision.tokens.6 --budget 0.5 --output_dir outputs/blip-hard
    python scripts/train_blip.py --config scripts/configs/blip.yaml --budget 0.3
    accelerate launch --num_processes 2 scripts/train_blip.py --config scripts/configs/blip.yaml      # two GPUs
    torchrun --nproc_per_node 2 scripts/train_blip.py --config scripts/configs/blip.yaml --cpu       # two CPU processes

Images and captions come from the Hub (--dataset_name), from a folder with a metadata.jsonl or metadata.csv (--train_dir), or from a csv or
json file of paths and captions (--train_file). Without --sites, --budget or --hard_attention the model trains soft, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoProcessor, BlipForConditionalGeneration

from hf_hardattn.training.arguments import ScriptArguments, flag
from hf_hardattn.training.loop import Task, start, train
from hf_hardattn.training.metrics import score_texts
from hf_hardattn.training.models import load_config, load_model, processor_source
from hf_hardattn.training.parsing import parse, run
from hf_hardattn.training.sources import as_images, column, load_splits


@dataclass(kw_only=True)
class Arguments(ScriptArguments):
    """Flags of this script, besides the shared ones."""

    output_dir: str = flag("outputs/blip", "Where the model, results.json, log.jsonl and checkpoints go.")
    image_column: str | None = flag(None, "Column of images or their paths: image, img by default.")
    caption_column: str | None = flag(None, "Column of captions: caption, text by default.")
    max_target_length: int = flag(64, "Tokens of a caption, at most.")
    num_beams: int = flag(1, "Beams in evaluation.")
    metrics: list[str] = flag(["bleu", "rouge"], "bleu (with chrF) | rouge")


@dataclass
class Collate:
    """Rows to pixel values and caption ids between the tokens that generation starts and stops at."""

    processor: Any
    image: str
    caption: str
    first: int
    last: int
    pad: int
    longest: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row[self.image].convert("RGB") for row in rows]
        encode = partial(self.processor.tokenizer.encode, add_special_tokens=False)
        ids = [[self.first, *encode(row[self.caption])[: self.longest - 2], self.last] for row in rows]
        width = max(map(len, ids))
        tokens = torch.tensor([row + [self.pad] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        labels = tokens.masked_fill(mask == 0, -100)
        return {"pixel_values": pixels, "input_ids": tokens, "attention_mask": mask, "labels": labels}


def predict(
    model: nn.Module, batch: dict[str, Any], *, accelerator: Accelerator, tokenizer: Any, args: Arguments
) -> tuple[list[str], list[str], list[float]]:
    """The caption generated for each image."""
    logits, labels = model(**batch).logits.float()[:, :-1], batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    generated = accelerator.unwrap_model(model).generate(
        pixel_values=batch["pixel_values"], num_beams=args.num_beams, max_new_tokens=args.max_target_length
    )
    texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (generated, batch["input_ids"])]
    return *texts, (losses.sum(1) / (labels != -100).sum(1).clamp(min=1)).tolist()


def setup(args: Arguments, accelerator: Accelerator) -> Task:
    """Data, processor and model."""
    training, validation = load_splits(args)
    data = validation if training is None else training
    image = column(data, args.image_column, ("image", "img"), "--image_column")
    caption = column(data, args.caption_column, ("caption", "text"), "--caption_column")

    config = load_config(args, BlipForConditionalGeneration)
    processor = AutoProcessor.from_pretrained(processor_source(args))
    if args.use_peft and args.lora_target_modules is None:
        args.lora_target_modules = ["qkv", "query", "value"]
    score_texts(args.metrics, ["a"], ["a"])  # fails now, not after the training, where a package is missing
    text = config.text_config
    special = {"first": text.bos_token_id, "last": text.sep_token_id, "pad": text.pad_token_id}
    return Task(
        name="image-captioning",
        model=load_model(args, BlipForConditionalGeneration, config),
        processor=processor,
        train=as_images(training, image, args.train_file),
        validation=as_images(validation, image, args.validation_file or args.train_file),
        collate=Collate(processor, image, caption, longest=args.max_target_length, **special),
        predict=partial(predict, accelerator=accelerator, tokenizer=processor.tokenizer, args=args),
        score=partial(score_texts, args.metrics),
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(Arguments, argv)
    accelerator = start(args)
    return train(accelerator, args, setup(args, accelerator), argv)


if __name__ == "__main__":
    run(main)
