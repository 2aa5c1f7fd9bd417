"""Pictures of the positions that a model keeps in a few validation examples, drawn during training."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from ..recording import Recording, record, selectors
from .arguments import ScriptArguments

if TYPE_CHECKING:
    from .loop import Task


def draw(accelerator: Accelerator, model: nn.Module, task: Task, args: ScriptArguments, step: int) -> None:
    """Draw the first validation examples with their selections: ``output_dir/validation/step_*.png``, or ``.html`` for texts.

    The picture of an image shows the patches that the last site of the vision tower kept, or else those that the text reads, if all its
    tokens share one selection; that of a text shows the tokens that the last site of the encoder kept. Selections that differ between
    queries are not drawn.

    All processes take part in the forward pass, because the model may be sharded; the main process draws. Trackers that accept images
    also receive the picture.
    """
    if task.validation is None or not selectors(model):
        return
    rows = list(islice(iter(task.validation), args.num_validation_examples))
    batch = {name: value.to(accelerator.device) for name, value in task.collate(rows).items()}
    training = model.training
    model.eval()
    with torch.no_grad(), accelerator.autocast(), record(model) as recording:
        model(**batch)
    model.train(training)
    if not accelerator.is_main_process:
        return
    path = Path(args.output_dir) / "validation" / f"step_{step:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = [site for site in recording.sites if site.startswith(("vision.inputs", "vision.tokens"))]
    seen = seen or [s for s in recording.sites if s.startswith("text.cross") and recording[s][0].mask.shape[2] == 1]
    read = [site for site in recording.sites if site.startswith("encoder.")]
    if seen and batch["pixel_values"].dim() == 4:
        _draw_images(accelerator, model, batch, recording, seen[-1], path.with_suffix(".png"), step)
    elif read:
        _write_texts(task, batch, recording, read[-1], path.with_suffix(".html"), step)


def _draw_images(
    accelerator: Accelerator, model: Any, batch: Any, recording: Recording, site: str, path: Path, step: int
) -> None:
    import numpy
    from PIL import Image

    from ..inspection.overlay import patch_overlay

    config = model.config
    patch = getattr(config, "vision_config", config).patch_size
    figure = patch_overlay(batch["pixel_values"], recording[site][0], patch, caption=f"{site}, step {step}")
    figure.savefig(path, dpi=110)
    if not accelerator.trackers:
        return
    with Image.open(path) as drawn:
        image = numpy.asarray(drawn.convert("RGB"))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"hardattn/kept": image[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"hardattn/kept": [image]}, step=step)


def _write_texts(task: Task, batch: Any, recording: Recording, site: str, path: Path, step: int) -> None:
    from ..inspection.html import page
    from ..inspection.tokens import mark_spans

    kept = recording.kept(recording[site][0]).flatten(1, 2).any(1).cpu()
    parts = []
    for ids, mask, chosen in zip(batch["input_ids"], batch["attention_mask"], kept, strict=True):
        text, spans = "", []
        for token, place in zip(ids[mask.bool()].tolist(), chosen[mask.bool()].tolist(), strict=True):
            piece = task.processor.decode([token]).strip()
            if place and piece:
                spans.append((len(text), len(text) + len(piece)))
            text += piece + " "
        parts.append(mark_spans(text, spans))
    path.write_text(page(f"{site}, step {step}", *parts), encoding="utf-8")
