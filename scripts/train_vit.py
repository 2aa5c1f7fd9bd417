"""Fine-tune ViT, hard or soft, to classify images.

    python scripts/train_vit.py --model_name_or_path google/vit-base-patch16-224-in21k --train_dir photos/train \
        --validation_dir photos/val --sites vision.tokens.3 vision.tokens.6 --budget 0.5 --output_dir outputs/vit-hard
    python scripts/train_vit.py --config scripts/configs/vit.yaml --budget 0.3
    accelerate launch --num_processes 2 scripts/train_vit.py --config scripts/configs/vit.yaml      # two GPUs
    torchrun --nproc_per_node 2 scripts/train_vit.py --config scripts/configs/vit.yaml --cpu       # two CPU processes

Images come from the Hub (--dataset_name), from folders named after their class (--train_dir), or from a csv or json file of paths and
labels (--train_file). Without --sites, --budget or --hard_attention the model trains soft, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import ClassLabel
from torch import nn
from transformers import AutoImageProcessor, ViTForImageClassification

from hf_hardattn.training.arguments import ScriptArguments, flag
from hf_hardattn.training.loop import Task, start, train
from hf_hardattn.training.metrics import accuracy
from hf_hardattn.training.models import load_config, load_model, processor_source
from hf_hardattn.training.parsing import parse, run
from hf_hardattn.training.sources import as_images, column, load_splits


@dataclass(kw_only=True)
class Arguments(ScriptArguments):
    """Flags of this script, besides the shared ones."""

    output_dir: str = flag("outputs/vit", "Where the model, results.json, log.jsonl and checkpoints go.")
    image_column: str | None = flag(None, "Column of images or their paths: image, img by default.")
    label_column: str | None = flag(None, "Column of labels: label, labels by default.")
    random_flip: bool = flag(False, "Mirror half of the training images.")


@dataclass
class Collate:
    """Rows to pixel values and label numbers."""

    processor: Any
    mode: str
    image: str
    label: str
    names: ClassLabel | None
    label2id: dict[str, int]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row[self.image].convert(self.mode) for row in rows]
        named = [self.names.int2str(row[self.label]) if self.names else str(row[self.label]) for row in rows]
        labels = torch.tensor([self.label2id[name] for name in named])
        return {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"], "labels": labels}


def predict(model: nn.Module, batch: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
    """The class of each image."""
    logits = model(pixel_values=batch["pixel_values"]).logits.float()
    losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    return logits.argmax(-1).tolist(), batch["labels"].tolist(), losses.tolist()


def flip(batch: dict[str, Any]) -> dict[str, Any]:
    """Mirror half of the images."""
    pixels = batch["pixel_values"]
    chosen = torch.rand(len(pixels), 1, 1, 1).to(pixels) < 0.5
    return {**batch, "pixel_values": torch.where(chosen, pixels.flip(-1), pixels)}


def setup(args: Arguments, accelerator: Accelerator) -> Task:
    """Data, labels, processor and model."""
    training, validation = load_splits(args)
    data = validation if training is None else training
    image = column(data, args.image_column, ("image", "img"), "--image_column")
    label = column(data, args.label_column, ("label", "labels"), "--label_column")
    training = as_images(training, image, args.train_file)
    validation = as_images(validation, image, args.validation_file or args.train_file)

    feature = data.features[label]
    names = feature if isinstance(feature, ClassLabel) else None
    changes: dict[str, Any] = {}
    if training is not None:  # a model that is only evaluated brings its own names
        classes = names.names if names else sorted({str(value) for value in training[label]})
        changes = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    config = load_config(args, ViTForImageClassification, **changes)
    if args.use_peft and args.lora_target_modules is None:
        args.lora_target_modules = ["q_proj", "v_proj"]
    model = load_model(args, ViTForImageClassification, config, heads=("classifier",))
    processor = AutoImageProcessor.from_pretrained(processor_source(args))
    mode = "L" if config.num_channels == 1 else "RGB"
    return Task(
        name="image-classification",
        model=model,
        processor=processor,
        train=training,
        validation=validation,
        collate=Collate(processor, mode, image, label, names, config.label2id),
        predict=predict,
        score=accuracy,
        augment=flip if args.random_flip else None,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(Arguments, argv)
    accelerator = start(args)
    return train(accelerator, args, setup(args, accelerator), argv)


if __name__ == "__main__":
    run(main)
