"""``comprehensiveness``: the drop in the answer's probability when the rationale is removed; higher is better."""

from collections.abc import Sequence
from typing import Any

import evaluate
import torch

from hf_hardattn.inspection.measures import comprehensiveness
from hf_hardattn.metrics._features import CURVES, PROBABILITIES

_CITATION = """DeYoung et al. 2020, ERASER: A Benchmark to Evaluate Rationalized NLP Models"""


class Comprehensiveness(evaluate.Metric):
    """Mean of p(y|x) - p(y|x without r); with several rationales of growing size per row, it is the AOPC."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions: p(y|x without r), one number per row or per threshold; references: p(y|x).",
            features=[CURVES, PROBABILITIES],
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        drop = comprehensiveness(torch.tensor(references), torch.tensor(predictions))
        return {"comprehensiveness": float(drop.mean())}
