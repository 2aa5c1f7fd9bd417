"""One self-contained page about what a model kept, and about what this proves and does not prove."""

from __future__ import annotations

import datetime
import html
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from ..api import status
from ..errors import HardAttentionError
from ..recording import record, selectors
from ..version import __version__
from . import attribution
from .curves import faithfulness_curves
from .faithfulness import compare, own_sufficiency
from .heatmap import heat_map
from .html import Html, cards, page, paragraph, picture, section, table
from .measures import rank_correlation
from .model_with_processor import ModelWithProcessor
from .perturbation import PerturbationEvaluator
from .sanity import randomised_weights
from .side_by_side import LIT, MARKED, ask, card, differences, in_short
from .verify import Report, verify

LIMITS = (
    "After each site, the model computed only on what was kept. That is a fact about the computation, not a reason in the human "
    "sense: it does not tell which of the kept positions mattered, nor whether another model would need them."
)


def explain(
    bundle: ModelWithProcessor,
    inputs: Sequence[Any],
    measure: bool = True,
    title: str = "",
    beside: ModelWithProcessor | None = None,
) -> Html:
    """Write the page: each input with full attention and with what the model kept, and what is proved and measured about this.

    Args:
        bundle: a hard model. inputs: PIL images or texts. measure: also measure faithfulness and run the sanity check (several hundred
            forward passes).
        title: of the page. beside: another model, hard or not, for the same kind of inputs, shown beside the first on every input.

    Returns:
        the source of the page, which has no scripts and makes no requests; ``Path("report.html").write_text(page)``.

    Raises:
        HardAttentionError: a soft model, no inputs, or two models of which one reads images and the other texts.
    """
    if not bundle.hard:
        raise HardAttentionError(
            f"{bundle.name} has no hard-attention sites to explain; load a hard checkpoint, or call apply()."
        )
    if not inputs:
        raise HardAttentionError("there is nothing to explain; pass at least one input.")
    if beside is not None and beside.takes_images is not bundle.takes_images:
        kinds = [f"{one.name} reads {'images' if one.takes_images else 'texts'}" for one in (bundle, beside)]
        raise HardAttentionError(
            f"{' and '.join(kinds)}; two models are shown on the same inputs. Use two models of the same kind."
        )
    names = _names(bundle, beside)
    asked = [[answer for one, name in names for answer in ask(one, given, name)] for given in inputs]
    shown = [card(given, answers) for given, answers in zip(inputs, asked, strict=True)]
    # A text, a grid of words or two models need the whole width.
    wide = beside is not None or not bundle.takes_images or bundle.model.can_generate()
    key = paragraph(LIT if bundle.takes_images else MARKED, "note")
    parts = [in_short(asked), section("What it kept", key, "\n".join(shown) if wide else cards(shown))]
    if beside is not None and beside.hard:
        parts.append(differences(bundle, beside, inputs))
    for one, name in names:
        parts += _about(one, inputs, measure, f": {name}" if name else "")
    return page(title or f"What {' and '.join(one.name for one, _ in names)} kept", *parts)


def _names(bundle: ModelWithProcessor, beside: ModelWithProcessor | None) -> list[tuple[ModelWithProcessor, str]]:
    """Return the models, each with a name that distinguishes it from the other."""
    if beside is None:
        return [(bundle, "")]
    same = bundle.name == beside.name
    return [(bundle, bundle.name + " (first)" * same), (beside, beside.name + " (second)" * same)]


def _about(bundle: ModelWithProcessor, inputs: Sequence[Any], measure: bool, name: str) -> list[str]:
    """Return the sections about one model; ``name`` is appended to their titles."""
    parts = []
    if bundle.hard:
        evaluator = PerturbationEvaluator(bundle.model, bundle.encode(inputs))
        parts.append(_certificate(verify(bundle.model, evaluator.batch), name))
        if measure:
            parts += [_measured(evaluator, name), _sanity(bundle, evaluator, name)]
        with record(bundle.model) as recording:
            bundle.model(**evaluator.batch)
        if len(inputs) > 1:
            figure = picture(
                heat_map(recording, grid=_grid(bundle, evaluator.batch)),
                "How often each position was kept, over these inputs. A position kept in all of them is position bias.",
            )
            parts.append(section(f"What it keeps in general{name}", figure))
    return [*parts, _provenance(bundle, len(inputs), name)]


def _grid(bundle: ModelWithProcessor, batch: dict[str, Any]) -> tuple[int, int] | None:
    """Return the number of patches down and across, if the model reads images and all its sites keep patches."""
    pixels = batch.get("pixel_values")
    sites = selectors(bundle.model)
    if pixels is None or pixels.dim() != 4 or not all(site.startswith("vision.") for site in sites):
        return None
    return bundle.grid(pixels)


def _provenance(bundle: ModelWithProcessor, inputs: int, name: str) -> str:
    """Return the section about the page itself: the model, its sites, and the versions that made it."""
    config = bundle.model.config
    rows = [
        ["model", f"{bundle.name} ({type(bundle.model).__name__})"],
        ["revision", getattr(config, "_commit_hash", None) or "a local folder"],
        ["parameters", f"{sum(parameter.numel() for parameter in bundle.model.parameters()):,}"],
        ["inputs", str(inputs)],
        ["hf_hardattn", __version__],
        ["transformers", transformers.__version__],
        ["torch", torch.__version__],
        ["written", datetime.date.today().isoformat()],
    ]
    return section(f"About this page{name}", table(["", ""], rows), f"<pre>{html.escape(status(bundle.model))}</pre>")


def _certificate(report: Report, name: str) -> str:
    verdict = "agree" if report.parity_ok else "DISAGREE"
    lines = [paragraph(site.statement + ".") for site in report.sites]
    lines += [paragraph(site.end_to_end + ".", "note") for site in report.sites if site.end_to_end is not None]
    note = f"Every dropped position was replaced by noise, by a constant and by its neighbour. Masked and gathered execution {verdict}."
    return section(f"What the dropped positions can still do{name}", *lines, paragraph(note, "note"))


def _measured(evaluator: PerturbationEvaluator, name: str) -> str:
    scores, absent = {}, []
    for method, make in attribution.EXPLANATIONS.items():
        try:
            scores[method] = make(evaluator)
        except (HardAttentionError, ImportError) as error:  # not available for this model or installation
            absent.append(paragraph(f"Not compared with {method}: {error}", "note"))
    left_out = None
    if evaluator.places.shape[1] <= 300:
        try:
            rank_correlation([0.0, 1.0], [0.0, 1.0])  # needs an extra; without it, only the other columns are measured
            left_out = attribution.leave_one_out(evaluator)
        except ImportError as error:
            absent.append(paragraph(f"Not compared with leave-one-out: {error}", "note"))
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
    rows = [[method, *(result.get(key, "") for key in names)] for method, result in measured.items()]
    parts = [
        table(header, rows),
        picture(
            faithfulness_curves(measured),
            "The probability of the answer as the best positions are removed, or added; in brackets: the areas under both curves.",
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
        text = f"With only what it kept, the probability of its answer changes by {own:g}"
        parts.append(paragraph(text + (": sufficiency is 0 by construction." if own == 0.0 else ", which is a bug.")))
    return section(f"How faithful that is, measured{name}", *parts)


def _sanity(bundle: ModelWithProcessor, evaluator: PerturbationEvaluator, name: str) -> str:
    found = randomised_weights(bundle.model, evaluator.batch, seeds=2)
    rows = [[site, value["jaccard"], value["chance"]] for site, value in found.items()]
    text = "Agreement far above chance would mean that the selection does not need what the model learned."
    return section(
        f"With shuffled weights{name}",
        table(["site", "agreement with the shuffled model (Jaccard)", "of random selections"], rows),
        paragraph(text, "note"),
        paragraph(LIMITS, "note"),
    )
