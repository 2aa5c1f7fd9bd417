"""One self-contained page about what a model kept, what that proves, and what it does not."""

from __future__ import annotations

import datetime
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..api import status
from ..efficiency.counting import count_flops
from ..errors import HardAttentionError
from ..modes import soft
from ..recording import record, selectors
from ..version import __version__
from . import attribution
from .alignment import selection_matrix
from .captions import caption_grid
from .curves import faithfulness_curves
from .faithfulness import compare, own_sufficiency
from .heatmap import heat_map
from .html import Html, cards, page, paragraph, picture, section, table
from .model_with_processor import ModelWithProcessor, Prediction
from .overlay import layer_overlay
from .perturbation import PerturbationEvaluator
from .sanity import randomised_weights
from .tokens import token_highlight
from .verify import Report, verify

LIT = "Lit and framed: patches kept at a site, with their share. Faded: dropped."
MARKED = "Marked: the tokens kept at a site. Struck through: dropped."
LIMITS = (
    "What was kept is what the model computed on from that site on. That is a fact about the computation, not a reason in a person's "
    "sense: it does not say which of the kept positions mattered, nor that another model would need them."
)


def explain(bundle: ModelWithProcessor, inputs: Sequence[Any], measure: bool = True, title: str = "") -> Html:
    """Write the page.

    Args:
        bundle: a hard model. inputs: PIL images or texts. measure: also faithfulness and the sanity check (some hundred forwards).
        title: of the page.

    Returns:
        the page's source, without scripts and without a request; ``Path("report.html").write_text(page)``.

    Raises:
        HardAttentionError: a soft model, or no inputs.
    """
    if not bundle.hard:
        raise HardAttentionError(
            f"{bundle.name} has no hard-attention sites to explain; load a hard checkpoint, or call apply()."
        )
    if not inputs:
        raise HardAttentionError("there is nothing to explain; give one input or more.")
    shown = [_one(bundle, given) for given in inputs]
    wide = not bundle.takes_images or bundle.model.can_generate()  # a text or a grid of words takes the whole width
    key = paragraph(LIT if bundle.takes_images else MARKED, "note")
    parts = [section("What it kept", key, "\n".join(shown) if wide else cards(shown))]
    evaluator = PerturbationEvaluator(bundle.model, bundle.encode(inputs))
    certificate = verify(bundle.model, evaluator.batch)
    parts.append(_certificate(certificate))
    if measure:
        parts += [_measured(evaluator), _sanity(bundle, evaluator)]
    with record(bundle.model) as recording:
        bundle.model(**evaluator.batch)
    if len(inputs) > 1:
        figure = picture(
            heat_map(recording, grid=_grid(bundle, evaluator.batch)),
            "How often each position was kept, over these inputs. A position kept in all of them is position bias.",
        )
        parts.append(section("What it keeps in general", figure))
    parts.append(_provenance(bundle, len(inputs)))
    return page(title or f"What {bundle.name} kept", *parts)


def _grid(bundle: ModelWithProcessor, batch: dict[str, Any]) -> tuple[int, int] | None:
    """Patches down and across, for images of a vision tower whose sites keep patches."""
    pixels = batch.get("pixel_values")
    sites = selectors(bundle.model)
    if pixels is None or pixels.dim() != 4 or not all(site.startswith("vision.") for site in sites):
        return None
    return pixels.shape[-2] // bundle.patch_size, pixels.shape[-1] // bundle.patch_size


def _provenance(bundle: ModelWithProcessor, inputs: int) -> str:
    """What the page is about: the model, its sites, and the versions that made it."""
    config = bundle.model.config
    rows: list[list[Any]] = [
        ["model", f"{bundle.name} ({type(bundle.model).__name__})"],
        ["revision", getattr(config, "_commit_hash", None) or "a local folder"],
        ["parameters", sum(parameter.numel() for parameter in bundle.model.parameters())],
        ["inputs", inputs],
        ["hf_hardattn", __version__],
        ["transformers", transformers.__version__],
        ["torch", torch.__version__],
        ["written", datetime.date.today().isoformat()],
    ]
    return section("About this page", table(["", ""], rows), f"<pre>{html.escape(status(bundle.model))}</pre>")


def _one(bundle: ModelWithProcessor, given: Any) -> str:
    batch = bundle.encode([given])
    hard = bundle.predict(batch)
    with soft(bundle.model):
        loose = bundle.predict(batch)
    scored = PerturbationEvaluator(bundle.model, batch).batch
    cost = count_flops(bundle.model, scored)
    with soft(bundle.model):
        whole = count_flops(bundle.model, scored)
    selection = hard.recording[hard.recording.sites[0]][0]
    candidates = (
        selection.valid if selection.protected is None else selection.valid & ~selection.protected
    )  # CLS and </s> are no choice
    kept, known = (int(m.flatten(0, 2).any(0).sum()) for m in (hard.recording.kept(selection, choice=True), candidates))
    line = (
        f"Answer: {quoted(hard)}. With full attention: {quoted(loose)}. It kept {kept} of {known} "
        f"{'patches' if bundle.takes_images else 'tokens'} at {selection.site}; {cost / whole:.0%} of the FLOPs of full attention."
    )
    label = Path(getattr(given, "filename", "")).name
    heading = f"<h3>{html.escape(label)}</h3>" if label else ""
    return heading + paragraph(line) + "\n".join(pictures(bundle, given, batch, hard))


def pictures(
    bundle: ModelWithProcessor, given: Any, batch: dict[str, Any], prediction: Prediction, whole: bool = True
) -> list[str]:
    """Draw every picture of one prediction, as pieces of HTML; ``whole`` draws the image itself beside what was kept."""
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
            once = " This site chooses once, for all words alike." if shared else ""
            found.append(picture(figure, f"For each word, the patches that the step producing it could read.{once}"))
        return found
    row = bundle.tokenizer(given, truncation=True, return_offsets_mapping=True)
    offsets = [(int(start), int(end)) for start, end in row["offset_mapping"]]
    for site in sites:
        if site.startswith(("encoder.inputs", "encoder.tokens")):
            found.append(paragraph(f"{site}:", "note"))
            found.append(token_highlight(recording, given, offsets, site))
    if cross:
        figure = selection_matrix(recording, bundle.words(row["input_ids"]), bundle.words(prediction.tokens), cross)
        found.append(picture(figure, "Which source tokens each generated token could read."))
    return found


def quoted(prediction: Prediction) -> str:
    """Put a prediction in quotes, with its probability."""
    return f"“{prediction.text}”" + ("" if prediction.probability is None else f" (p = {prediction.probability:.2f})")


def _certificate(report: Report) -> str:
    verdict = "agree" if report.parity_ok else "DISAGREE"
    lines = [paragraph(site.statement + ".") for site in report.sites]
    lines += [paragraph(site.end_to_end + ".", "note") for site in report.sites if site.end_to_end is not None]
    note = f"Every dropped position was replaced by noise, by a constant and by its neighbour. Masked and gathered execution {verdict}."
    return section("What the dropped positions can still do", *lines, paragraph(note, "note"))


def _measured(evaluator: PerturbationEvaluator) -> str:
    scores, absent = {}, []
    for name, make in attribution.EXPLANATIONS.items():
        try:
            scores[name] = make(evaluator)
        except (HardAttentionError, ImportError) as error:  # a comparison that this model or installation has not
            absent.append(paragraph(f"Not compared with {name}: {error}", "note"))
    left_out = attribution.leave_one_out(evaluator) if evaluator.places.shape[1] <= 300 else None
    measured = compare(evaluator, scores, leave_one_out=left_out)
    names = ["sufficiency", "comprehensiveness", "deletion", "insertion", "rank_correlation"]
    header = [
        "explanation",
        "sufficiency ↓",
        "comprehensiveness ↑",
        "deletion ↓",
        "insertion ↑",
        "tau with leave-one-out ↑",
    ]
    rows = [[name, *(result.get(key, "") for key in names)] for name, result in measured.items()]
    parts = [
        table(header, rows),
        picture(
            faithfulness_curves(measured),
            "The probability of the answer as the best positions are removed, or added; in brackets the areas under both curves.",
        ),
    ]
    how = "left out of the computation" if evaluator.removal == "select" else "masked or greyed"
    note = (
        f"Means over {len(evaluator.full)} inputs; positions are {how}. Sufficiency and comprehensiveness are averaged over rationales of 1, 5, 10, "
        "20 and 50 % of the positions (ERASER's AOPC)."
    )
    parts += [paragraph(note, "note"), *absent]
    if evaluator.removal == "select":
        own = own_sufficiency(evaluator).abs().max().item()
        text = f"On exactly what it kept, its answer's probability changes by {own:g}"
        parts.append(paragraph(text + (": sufficiency is 0 by construction." if own == 0.0 else ", which is a bug.")))
    return section("How faithful that is, measured", *parts)


def _sanity(bundle: ModelWithProcessor, evaluator: PerturbationEvaluator) -> str:
    found = randomised_weights(bundle.model, evaluator.batch, seeds=2)
    rows = [[site, value["jaccard"], value["chance"]] for site, value in found.items()]
    text = "Agreement far above chance would mean that the selection does not need what the model learned."
    return section(
        "With shuffled weights",
        table(["site", "agreement with the shuffled model (Jaccard)", "of random choices"], rows),
        paragraph(text, "note"),
        paragraph(LIMITS, "note"),
    )
