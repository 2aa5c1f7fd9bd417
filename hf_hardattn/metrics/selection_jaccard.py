"""``selection_jaccard``: agreement of two models' (or seeds') selections."""

from collections.abc import Sequence
from typing import Any

import evaluate

from hf_hardattn.inspection.measures import overlap
from hf_hardattn.metrics._features import CHOICES

_CITATION = """Jaccard 1912, The distribution of the flora in the alpine zone"""


class SelectionJaccard(evaluate.Metric):
    """Mean over rows of the Jaccard index of two choices."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions and references: 0 or 1 per position.",
            features=CHOICES,
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        rows = [overlap(one, other) for one, other in zip(predictions, references, strict=True)]
        return {"selection_jaccard": sum(rows) / len(rows)}
