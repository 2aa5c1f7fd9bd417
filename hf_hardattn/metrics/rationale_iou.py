"""``rationale_iou``: intersection over union of kept places and a person's rationale."""

from collections.abc import Sequence
from typing import Any

import evaluate

from hf_hardattn.inspection.measures import overlap
from hf_hardattn.metrics._features import CHOICES

_CITATION = """DeYoung et al. 2020, ERASER: A Benchmark to Evaluate Rationalized NLP Models"""


class RationaleIou(evaluate.Metric):
    """Mean over rows of |A and B| / |A or B|."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions and references: 0 or 1 per position.",
            features=CHOICES,
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        rows = [overlap(found, human) for found, human in zip(predictions, references, strict=True)]
        return {"rationale_iou": sum(rows) / len(rows)}
