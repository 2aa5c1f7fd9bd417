"""Metrics that need no network. Each maps predictions and references to named numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import missing_extra, unknown


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Share of equal entries, in [0, 1]."""
    right = sum(int(p) == int(r) for p, r in zip(predictions, references, strict=True))
    return {"accuracy": right / max(len(predictions), 1)}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF in [0, 100], by sacrebleu (13a tokens, one reference)."""
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_extra("sacrebleu", "metrics", "--metrics bleu") from error
    return {
        "bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(predictions), [list(references)]).score,
    }


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, -2 and -L F1 in [0, 100], stemmed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_extra("rouge-score", "metrics", "--metrics rouge") from error
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    rows = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)]
    return {name: 100 * sum(row[name].fmeasure for row in rows) / max(len(rows), 1) for name in names}


TEXT_METRICS = {"bleu": bleu, "rouge": rouge}


def score_texts(names: Sequence[str], predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The metrics called ``names``."""
    for name in names:
        if name not in TEXT_METRICS:
            raise unknown("metric", name, TEXT_METRICS)
    clean = [[text.strip() for text in texts] for texts in (predictions, references)]
    return {key: value for name in names for key, value in TEXT_METRICS[name](*clean).items()}
