"""``rationale_f1``: precision, recall and F1 of kept places against a person's rationale."""

from collections.abc import Sequence
from typing import Any

import evaluate

from hf_hardattn.inspection.measures import token_f1
from hf_hardattn.metrics._features import CHOICES

_CITATION = """DeYoung et al. 2020, ERASER: A Benchmark to Evaluate Rationalized NLP Models"""


class RationaleF1(evaluate.Metric):
    """Mean over rows of token-level precision, recall and F1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions and references: 0 or 1 per position.",
            features=CHOICES,
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        rows = [token_f1(found, human) for found, human in zip(predictions, references, strict=True)]
        return {
            f"rationale_{name}": sum(row[name] for row in rows) / len(rows) for name in ("precision", "recall", "f1")
        }
