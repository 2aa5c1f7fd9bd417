"""The answers of one or two models to one input: with full attention, and with hard attention."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from ..efficiency.counting import count_flops
from ..errors import HardAttentionError
from ..modes import soft
from .agreement import selection_diff
from .alignment import selection_matrix
from .captions import caption_grid
from .html import panels, paragraph, picture, section, table
from .model_with_processor import ModelWithProcessor, Prediction
from .overlay import difference_overlay, layer_overlay, whole_image
from .perturbation import PerturbationEvaluator
from .tokens import token_highlight

LIT = "Lit and framed: patches kept at a site, with their share. Faded: dropped."
MARKED = "Marked: the tokens kept at a site. Struck through: dropped."


@dataclass
class Answer:
    """The answer of one model to one input.

    Attributes:
        bundle: the model. name: shown on the page. hard: whether its sites selected. batch: the encoded input.
        prediction: with the selections of a hard model. flops: counted, of the forward pass that scores the answer.
    """

    bundle: ModelWithProcessor
    name: str
    hard: bool
    batch: dict[str, Any]
    prediction: Prediction
    flops: float

    def row(self, full: Answer) -> list[Any]:
        """Return a row of the table of answers; ``full`` is the answer of the same model with full attention."""
        certain = self.prediction.probability
        cells = [self.name, self.prediction.text, "" if certain is None else f"{certain:.2f}"]
        return [*cells, self.kept(), f"{self.flops / full.flops:.0%}"]

    def kept(self) -> str:
        """Return how many positions the first site kept, out of those it could choose from, without protected ones."""
        if not self.hard:
            return "all"
        recording = self.prediction.recording
        selection = recording[recording.sites[0]][0]
        free = selection.valid if selection.protected is None else selection.valid & ~selection.protected
        kept, known = (int(mask.flatten(0, 2).any(0).sum()) for mask in (recording.kept(selection, choice=True), free))
        return f"{kept} of {known} {'patches' if self.bundle.takes_images else 'tokens'} at {selection.site}"


def ask(bundle: ModelWithProcessor, given: Any, name: str = "") -> list[Answer]:
    """Run a model on one input with full attention and, if it is hard, with its sites.

    Args:
        given: PIL image or text. name: prefix for the names of its answers, if two models are shown.
    """
    found = []
    batch = bundle.encode([given])
    for hard in (False, True)[: 1 + bundle.hard]:
        with contextlib.nullcontext() if hard or not bundle.hard else soft(bundle.model):
            prediction = bundle.predict(batch)
            flops = count_flops(bundle.model, PerturbationEvaluator(bundle.model, batch).batch)
        words = [name] * bool(name) + ["hard attention" if hard else "full attention"]
        found.append(Answer(bundle, ", ".join(words), hard, batch, prediction, flops))
    return found


def card(given: Any, answers: Sequence[Answer]) -> str:
    """Show one input: the image with full attention beside the patches that each hard model kept, and a table of all answers."""
    label = Path(getattr(given, "filename", "")).name
    heading = f"<h3>{escape(label)}</h3>" if label else ""
    shown = []
    if answers[0].bundle.takes_images:
        image = picture(
            whole_image(answers[0].batch["pixel_values"]), "The image, with all patches computed.", 140, caption=False
        )
        shown.append(("Full attention", image))
    hard = [answer for answer in answers if answer.hard]
    for answer in hard:
        title = answer.name if len(hard) > 1 else "Hard attention"
        shown.append((title, "\n".join(pictures(answer.bundle, given, answer.batch, answer.prediction, whole=False))))
    rows, full = [], answers[0]
    for answer in answers:
        full = full if answer.hard else answer
        rows.append(answer.row(full))
    header = ["", "answer", "probability", "kept", "FLOPs"]
    if all(row[2] == "" for row in rows):  # a text does not have a single probability
        header, rows = [*header[:2], *header[3:]], [[*row[:2], *row[3:]] for row in rows]
    return heading + panels(shown) + table(header, rows)


def pictures(
    bundle: ModelWithProcessor, given: Any, batch: dict[str, Any], prediction: Prediction, whole: bool = True
) -> list[str]:
    """Draw all pictures of one prediction, as pieces of HTML; ``whole`` also draws the image itself."""
    recording, found = prediction.recording, []
    sites = recording.sites
    cross = next((site for site in sites if ".cross." in site), None)
    if bundle.takes_images:
        pixels = batch["pixel_values"]
        if any(site.startswith("vision.") for site in sites):
            found.append(
                picture(layer_overlay(pixels, recording, bundle.patch_size, whole=whole), LIT, dpi=140, caption=False)
            )
        if prediction.tokens and (cross or any(site.startswith("vision.") for site in sites)):
            words = bundle.words(prediction.tokens)
            figure = caption_grid(pixels, recording, words, bundle.patch_size, cross)
            shared = not cross or len(recording[cross]) == 1 and recording[cross][0].mask.shape[2] == 1
            once = " This site makes one selection for all words." if shared else ""
            found.append(picture(figure, f"For each word, the patches that the step producing it could read.{once}"))
        return found
    row = bundle.tokenizer(given, truncation=True, return_offsets_mapping=True)
    offsets = [(int(start), int(end)) for start, end in row["offset_mapping"]]
    for site in sites:
        kind = site.split(".")[1]
        # The keys of a prompt are chosen once, for all tokens that are generated after it.
        if kind in ("inputs", "tokens") or (kind == "self" and bundle.goes_on):
            found.append(paragraph(f"{site}:", "note"))
            found.append(token_highlight(recording, given, offsets, site))
    if cross:
        figure = selection_matrix(recording, bundle.words(row["input_ids"]), bundle.words(prediction.tokens), cross)
        found.append(picture(figure, "Which source tokens each generated token could read."))
    return found


def quoted(prediction: Prediction) -> str:
    """Put a prediction in quotes, with its probability."""
    return f"“{prediction.text}”" + ("" if prediction.probability is None else f" (p = {prediction.probability:.2f})")


def in_short(asked: Sequence[Sequence[Answer]]) -> str:
    """Compare the answers to all inputs: how often each agrees with the first, and how much each costs."""
    first, rows = [answers[0] for answers in asked], []
    fulls = first
    for column in zip(*asked, strict=True):
        fulls = fulls if column[0].hard else list(column)
        same = sum(one.prediction.text == other.prediction.text for one, other in zip(column, first, strict=True))
        cost = sum(answer.flops for answer in column) / sum(answer.flops for answer in fulls)
        rows.append([column[0].name, f"{same} of {len(asked)}", f"{cost:.0%}"])
    header = ["", "same answers as the first row", "FLOPs, relative to full attention"]
    return section("In short", table(header, rows))


@torch.no_grad()
def differences(one: ModelWithProcessor, other: ModelWithProcessor, inputs: Sequence[Any]) -> str:
    """Show how the selections of two hard models differ on the same inputs, site by site."""
    title = "Where the two selections differ"
    batch, second = one.encode(inputs), other.encode(inputs)
    alike = batch.keys() == second.keys() and all(batch[name].shape == second[name].shape for name in batch)
    if not alike or "input_ids" in batch and not torch.equal(batch["input_ids"], second["input_ids"]):
        return section(
            title,
            paragraph(
                "The two models split these inputs into different positions, so their selections cannot be compared.",
                "note",
            ),
        )
    scored = PerturbationEvaluator(one.model, batch).batch  # includes the first model's answer if it generates text
    try:
        found = selection_diff(one.model, other.model, scored)
    except HardAttentionError as error:
        return section(title, paragraph(f"Not compared: {error}", "note"))
    rows = [[difference.site, difference.jaccard, difference.chance] for difference in found]
    parts = [table(["site", "overlap (Jaccard)", "of random selections"], rows)]
    drawn = next((difference for difference in found if difference.site.startswith("vision.")), None)
    if drawn is not None and batch["pixel_values"].dim() == 4:
        text = "Thin frames: both keep the patch. Thick: only the first. Dotted: only the second. The inputs that differ most come first."
        parts.append(picture(difference_overlay(batch["pixel_values"], drawn, one.patch_size), text, dpi=140))
    return section(title, *parts)
