"""Definitions of faithfulness, plausibility and agreement as functions of numbers; the modules in ``metrics/`` call these.

p is the model's probability of its own answer y^, given the whole input x, the rationale r alone, or x without r.
Source of the ERASER definitions: DeYoung et al. 2020, "ERASER: A Benchmark to Evaluate Rationalized NLP Models", section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import HardAttentionError, missing_extra

THRESHOLDS = (0.01, 0.05, 0.1, 0.2, 0.5)  # ERASER's bins: shares of the input that a rationale keeps


def sufficiency(full: Tensor, rationale: Tensor) -> Tensor:
    """Return ``p(y^|x) - p(y^|r)``; lower is better, and 0 means that the rationale alone gives the answer the same probability.

    Args:
        full: ``[B]``. rationale: ``[B]`` or ``[B, thresholds]``.

    Returns:
        a tensor of the shape of ``rationale``; its mean over thresholds is the AOPC.
    """
    return full.view(-1, *[1] * (rationale.dim() - 1)) - rationale


def comprehensiveness(full: Tensor, rest: Tensor) -> Tensor:
    """Return ``p(y^|x) - p(y^|x without r)``; higher is better: the answer depends on the rationale. Shapes as in ``sufficiency``."""
    return sufficiency(full, rest)


def area(curve: Tensor) -> Tensor:
    """Return the area under a deletion or insertion curve ``[B, steps]`` over [0, 1], by the trapezoidal rule.

    Deletion removes the most important places first (lower is better); insertion adds them first (higher is better).
    Source: Petsiuk, Das & Saenko 2018, "RISE", arXiv:1806.07421.
    """
    if curve.shape[-1] < 2:
        raise HardAttentionError(f"a curve of {curve.shape[-1]} points has no area; it needs at least 2.")
    return torch.trapezoid(curve, dx=1.0 / (curve.shape[-1] - 1), dim=-1)


def token_f1(found: Sequence[int], human: Sequence[int]) -> dict[str, float]:
    """Return precision, recall and F1 of kept places against a person's rationale (both 0 or 1 per place); 0 if nothing is shared."""
    both = sum(1 for a, b in zip(found, human, strict=True) if a and b)
    precision = both / max(1, sum(map(bool, found)))
    recall = both / max(1, sum(map(bool, human)))
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Return ``|A and B| / |A or B|`` (intersection over union, Jaccard index) of two choices, 0 or 1 per place; 1 if both are empty."""
    both = sum(1 for a, b in zip(one, other, strict=True) if a and b)
    any_ = sum(1 for a, b in zip(one, other, strict=True) if a or b)
    return both / any_ if any_ else 1.0


def average_precision(scores: Sequence[float], human: Sequence[int]) -> float:
    """Return the area under the precision-recall curve of ``scores`` against a person's rationale; NaN if the rationale is empty."""
    try:
        from sklearn.metrics import average_precision_score
    except ImportError as error:
        raise missing_extra("scikit-learn", "interpret", "the area under a precision-recall curve") from error
    return float(average_precision_score(list(human), list(scores))) if any(human) else float("nan")


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Kendall's tau-b between two rankings of the same places; NaN if one is constant.

    Source: Jain & Wallace 2019, "Attention is not Explanation", which uses it to compare attention with leave-one-out.
    """
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise missing_extra("scipy", "interpret", "a rank correlation") from error
    return float(kendalltau(list(one), list(other)).statistic)


def chance_overlap(places: int, one: int, other: int) -> float:
    """Return the expected ``overlap`` of random choices of ``one`` and ``other`` out of ``places``, which agreement must exceed."""
    from math import comb

    ways = comb(places, other)
    return sum(
        comb(one, both)
        * comb(places - one, other - both)
        / ways
        * (both / (one + other - both) if one + other else 1.0)
        for both in range(max(0, one + other - places), min(one, other) + 1)
    )
