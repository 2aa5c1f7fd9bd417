"""``rationale_auprc``: area under the precision-recall curve of scores against a person's rationale."""

from collections.abc import Sequence
from typing import Any

import evaluate

from hf_hardattn.inspection.measures import average_precision
from hf_hardattn.metrics._features import SCORES_AND_CHOICES

_CITATION = """DeYoung et al. 2020, ERASER: A Benchmark to Evaluate Rationalized NLP Models"""


class RationaleAuprc(evaluate.Metric):
    """Mean over the rows whose rationale is not empty."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions: one score per position; references: 0 or 1 per position.",
            features=SCORES_AND_CHOICES,
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        pairs = [(scores, human) for scores, human in zip(predictions, references, strict=True) if any(human)]
        rows = [average_precision(scores, human) for scores, human in pairs]
        return {"rationale_auprc": sum(rows) / len(rows) if rows else float("nan")}
