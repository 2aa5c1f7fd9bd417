"""``sufficiency``: the drop in the answer's probability when only the rationale is left; lower is better."""

from collections.abc import Sequence
from typing import Any

import evaluate
import torch

from hf_hardattn.inspection.measures import sufficiency
from hf_hardattn.metrics._features import CURVES, PROBABILITIES

_CITATION = """DeYoung et al. 2020, ERASER: A Benchmark to Evaluate Rationalized NLP Models"""


class Sufficiency(evaluate.Metric):
    """Mean of p(y|x) - p(y|r); with several rationales of growing size per row, it is the AOPC."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions: p(y|r), one number per row or per threshold; references: p(y|x).",
            features=[CURVES, PROBABILITIES],
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        drop = sufficiency(torch.tensor(references), torch.tensor(predictions))
        return {"sufficiency": float(drop.mean())}
