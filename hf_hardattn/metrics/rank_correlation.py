"""``rank_correlation``: Kendall's tau between two rankings of the places, such as scores and leave-one-out."""

from collections.abc import Sequence
from typing import Any

import evaluate

from hf_hardattn.inspection.measures import rank_correlation
from hf_hardattn.metrics._features import SCORES

_CITATION = """Jain and Wallace 2019, Attention is not Explanation"""


class RankCorrelation(evaluate.Metric):
    """Mean over the rows where neither ranking is constant."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description="predictions and references: one score per position.",
            features=SCORES,
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        rows = [rank_correlation(one, other) for one, other in zip(predictions, references, strict=True)]
        known = [row for row in rows if row == row]
        return {"rank_correlation": sum(known) / len(known) if known else float("nan")}
