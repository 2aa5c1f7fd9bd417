"""Faithfulness of an explanation, measured on the model it explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional.topk import topk_mask
from .measures import (
    THRESHOLDS,
    area,
    average_precision,
    comprehensiveness,
    overlap,
    rank_correlation,
    sufficiency,
    token_f1,
)
from .perturbation import PerturbationEvaluator


def top(scores: Tensor, places: Tensor, ratio: float) -> Tensor:
    """Return the ``max(1, ceil(ratio * places))`` best-scored places of each row, bool ``[B, P]``; ties go to the lower index."""
    k = (places.sum(-1) * ratio - 1e-9).ceil().long().clamp(min=1 if ratio > 0 else 0)
    return topk_mask(scores.float(), k, places)


def faithfulness(
    evaluator: PerturbationEvaluator,
    scores: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    steps: int = 10,
    human: Tensor | None = None,
    leave_one_out: Tensor | None = None,
) -> dict[str, Any]:
    """Measure one explanation; every number is a mean over the rows of the evaluator.

    Args:
        scores: ``[B, P]``, higher = more important. thresholds: shares of the input taken as rationale.
        steps: number of steps of the deletion and insertion curves. human: bool ``[B, P]``, rationales marked by people.
        leave_one_out: ``[B, P]``, from ``attribution.leave_one_out``.

    Returns:
        ``sufficiency`` and ``comprehensiveness`` (AOPC over the thresholds), ``deletion`` and ``insertion`` (areas, relative to p of
        the whole input), and ``curves``. With ``leave_one_out``, also ``rank_correlation`` with it. With ``human``, also
        ``sufficiency_of_size``, ``comprehensiveness_of_size``, ``f1`` and ``iou`` of as many places as the person marked, and
        ``auprc``. A person's rationale is a set without an order, so compare it by these. ``measures`` has the definitions.
    """
    places, full = evaluator.places, evaluator.full
    chosen = [top(scores, places, ratio) for ratio in thresholds]
    only = torch.stack([evaluator(keep) for keep in chosen], 1)
    rest = torch.stack([evaluator(places & ~keep) for keep in chosen], 1)
    ordered = [top(scores, places, step / steps) for step in range(steps + 1)]
    insertion = torch.stack([evaluator(keep) for keep in ordered], 1)
    deletion = torch.stack([evaluator(places & ~keep) for keep in ordered], 1)
    whole = full[:, None].clamp(min=1e-9)
    result: dict[str, Any] = {
        "sufficiency": float(sufficiency(full, only).mean()),
        "comprehensiveness": float(comprehensiveness(full, rest).mean()),
        "deletion": float(area(deletion / whole).mean()),
        "insertion": float(area(insertion / whole).mean()),
        "curves": {
            "deletion": (deletion / whole).mean(0).tolist(),
            "insertion": (insertion / whole).mean(0).tolist(),
        },
    }
    if leave_one_out is not None:
        pairs = zip(scores, leave_one_out, places, strict=True)
        found = [rank_correlation(a[where].tolist(), b[where].tolist()) for a, b, where in pairs]
        known = [value for value in found if value == value]
        result["rank_correlation"] = sum(known) / len(known) if known else float("nan")
    if human is not None:
        mine = topk_mask(scores.float(), (human & places).sum(-1), places)
        result["sufficiency_of_size"] = float(sufficiency(full, evaluator(mine)).mean())
        result["comprehensiveness_of_size"] = float(comprehensiveness(full, evaluator(places & ~mine)).mean())
        result |= plausibility(scores, human & places, places)
    return result


def plausibility(scores: Tensor, human: Tensor, places: Tensor) -> dict[str, float]:
    """Return the agreement with human rationales, bool ``[B, P]``: ``auprc``, and ``f1`` and ``iou`` of as many places as marked."""
    mine = topk_mask(scores.float(), human.sum(-1), places)
    rows = list(zip(mine, human, scores, places, strict=True))
    f1 = [token_f1(a[w].tolist(), h[w].tolist())["f1"] for a, h, _, w in rows]
    iou = [overlap(a[w].tolist(), h[w].tolist()) for a, h, _, w in rows]
    auprc = [average_precision(s[w].tolist(), h[w].tolist()) for _, h, s, w in rows if bool(h[w].any())]
    return {
        "f1": sum(f1) / len(f1),
        "iou": sum(iou) / len(iou),
        "auprc": sum(auprc) / len(auprc) if auprc else float("nan"),
    }


def own_sufficiency(evaluator: PerturbationEvaluator) -> Tensor:
    """Return ``p(y^|x) - p(y^|kept positions)``, fp32 ``[B]``. With an ``inputs`` site and removal ``select`` it is 0 by construction,
    because both are the same computation. Rounding errors remain only if no row of the batch fills all slots (all are padded)."""
    return evaluator.full - evaluator(evaluator.own())


def compare(
    evaluator: PerturbationEvaluator, explanations: Mapping[str, Tensor], **options: Any
) -> dict[str, dict[str, Any]]:
    """Return ``faithfulness`` of several explanations of the same answers, by name; ``options`` are passed on to it."""
    return {name: faithfulness(evaluator, scores, **options) for name, scores in explanations.items()}
