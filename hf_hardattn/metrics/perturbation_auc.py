"""``perturbation_auc``: area under a deletion curve (lower is better) or an insertion curve (higher is better)."""

from collections.abc import Sequence
from typing import Any

import evaluate
import torch

from hf_hardattn.inspection.measures import area
from hf_hardattn.metrics._features import CURVES

_CITATION = """Petsiuk, Das and Saenko 2018, RISE: Randomized Input Sampling for Explanation of Black-box Models"""


class PerturbationAuc(evaluate.Metric):
    """Mean area under p(y|x), divided by p of the whole input, as places are removed or added by importance."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions: p(y|.) at equal steps from one end to the other; references: p(y|x), by which the curve is divided.",
            features=CURVES,
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        full = torch.tensor(references).clamp(min=1e-9)
        areas = [area(torch.tensor(curve)) for curve in predictions]
        return {"perturbation_auc": float((torch.stack(areas) / full).mean())}
